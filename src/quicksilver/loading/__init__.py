"""From a name, a folder or a model in memory to a model that runs under a plan; tokenizers too."""
