"""Fusion: which adjacent tokens become one; a rule a file."""
