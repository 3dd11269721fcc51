"""The package's version, in one place; nothing else belongs here."""

__version__ = "0.1.0"
