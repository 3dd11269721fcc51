"""What numbers from outside are checked for."""

from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)
