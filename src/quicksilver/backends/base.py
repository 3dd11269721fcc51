"""What the loop asks of whoever runs layers."""

from collections.abc import Iterator
from typing import Protocol

from quicksilver.backends.state import PassContext, State


class LayerBackend(Protocol):
    """Runs a model's layers under a resolved plan, writes their entries, and counts."""

    @property
    def name(self) -> str:
        """What it is called: "native" or "pytorch"."""
        ...

    @property
    def reason(self) -> str | None:
        """Why not a faster one, None where this is the fastest."""
        ...

    def spans(self, state: State, context: PassContext) -> Iterator[range]:
        """Give the layers to run next, again and again to the last; how many at once depends on the state by then."""
        ...

    def run(self, span: range, state: State, context: PassContext) -> None:
        """Run these layers for the tokens that run on: write all entries, count, change the state."""
        ...
