"""Watching a model's modules while it runs on calibration text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

Observe = Callable[[int, Any, tuple[Any, ...], Tensor], None]
"""(which module, the module, its arguments, its output), after each call."""


@contextmanager
def observing(modules: Sequence[nn.Module], observe: Observe) -> Iterator[None]:
    """Call `observe` after each call of one of the modules, as long as the context lasts."""
    hooks = []
    try:
        for i, module in enumerate(modules):
            hooks.append(module.register_forward_hook(partial(observe, i)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
