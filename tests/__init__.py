"""Tests of the package; none of them depends on how long anything takes."""

HANGS = 600  # seconds after which a process or a thread counts as stuck
