"""Halting: which tokens stop early, which sublayers they skip; a rule a file."""
