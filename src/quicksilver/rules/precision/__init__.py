"""Precision: how many bits of each weight are read; a rule a file."""
