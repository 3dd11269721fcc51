"""`quicksilver models`: what can be run."""

import click


@click.command("models", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """List the model families supported (transformers' model_type) and the embedded models.

    \b
    Examples:
      quicksilver models
    """
    from quicksilver.core.sources import embedded_models
    from quicksilver.families.names import FAMILIES

    print("families:")
    for name in FAMILIES:
        print(f"  {name}")
    print("embedded models:")
    for name in embedded_models():
        print(f"  {name}")
