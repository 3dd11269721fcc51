"""The rules of arXiv 2506.22396, literally."""
