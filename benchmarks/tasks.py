"""What the engines are asked to do: prefill, decode after a short prompt or a long one, generate.

Every engine gets the same tokens through the same calls; which engines there are is `contenders.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from benchmarks.contenders import DENSE, FUSED, HALVED, HUGGINGFACE


class Task(Protocol):
    """A piece of work, one model call after another.

    Attributes:
        name: as in tables and rows.
        unit: of its figure.
        divisor: what the seconds of one run are divided by to give the figure.
        engines: names of those that do it; None for all.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    engines: ClassVar[tuple[str, ...] | None]

    @property
    def divisor(self) -> int: ...

    @property
    def prompt(self) -> int:
        """Tokens of the prompt, at positions from 0 on, which `prepare` or `calls` feeds in one pass."""
        ...

    @property
    def passes(self) -> tuple[range, ...]:
        """Positions of the tokens that `calls` feeds, pass by pass."""
        ...

    def prepare(self, model: Any) -> Any:
        """Return the state that `calls` needs; not timed."""
        ...

    def calls(self, model: Any, state: Any) -> Iterator[Tensor]:
        """Do the work; yield what each model call gave."""
        ...


@dataclass(frozen=True)
class Prefill:
    """One pass over a prompt, ids [1, T], with logits for its last token only."""

    ids: Tensor

    name: ClassVar[str] = "prefill"
    unit: ClassVar[str] = "seconds"
    engines: ClassVar[tuple[str, ...] | None] = None

    @property
    def divisor(self) -> int:
        return 1

    @property
    def prompt(self) -> int:
        return self.ids.shape[1]

    @property
    def passes(self) -> tuple[range, ...]:
        return (range(self.prompt),)

    def prepare(self, model: Any) -> None:
        """Need nothing."""

    def calls(self, model: Any, state: None) -> Iterator[Tensor]:
        """Run the one pass; yield its logits."""
        yield model(self.ids, use_cache=True, logits_to_keep=1).logits


@dataclass(frozen=True)
class Decode:
    """Given tokens fed one at a time through the cache; the first `prompt` of ids [1, prompt + T] are its prompt."""

    ids: Tensor
    prompt: int

    name: ClassVar[str] = "decode"
    unit: ClassVar[str] = "seconds per token"
    engines: ClassVar[tuple[str, ...] | None] = (HUGGINGFACE, DENSE, *HALVED)

    @property
    def divisor(self) -> int:
        return len(self.passes)

    @property
    def passes(self) -> tuple[range, ...]:
        return _one_by_one(self.prompt, self.ids.shape[1])

    def prepare(self, model: Any) -> Any:
        """Prefill the prompt; return its cache."""
        return model(self.ids[:, : self.prompt], use_cache=True, logits_to_keep=1).past_key_values

    def calls(self, model: Any, state: Any) -> Iterator[Tensor]:
        """Feed the tokens after the prompt; yield each one's logits."""
        for fed in self.passes:
            token = self.ids[:, fed.start : fed.stop]
            yield model(token, past_key_values=state, use_cache=True, logits_to_keep=1).logits


class DecodeLong(Decode):
    """The same after a prompt so long that its keys and values weigh: what a fused prompt saves of their bytes."""

    name: ClassVar[str] = "decode-long"
    engines: ClassVar[tuple[str, ...] | None] = (HUGGINGFACE, DENSE, FUSED)


@dataclass(frozen=True)
class Generate:
    """Greedy `generate` as a user calls it, prompt [1, T] included."""

    ids: Tensor
    new_tokens: int

    name: ClassVar[str] = "generate"
    unit: ClassVar[str] = "seconds"
    engines: ClassVar[tuple[str, ...] | None] = (HUGGINGFACE, DENSE)

    @property
    def divisor(self) -> int:
        return 1

    @property
    def prompt(self) -> int:
        return self.ids.shape[1]

    @property
    def passes(self) -> tuple[range, ...]:
        end = self.prompt + self.new_tokens - 1  # the last token is never fed
        return (range(self.prompt), *_one_by_one(self.prompt, end))

    def prepare(self, model: Any) -> None:
        """Need nothing."""

    def calls(self, model: Any, state: None) -> Iterator[Tensor]:
        """Run the one call; yield the token ids, prompt first."""
        yield model.generate(self.ids, max_new_tokens=self.new_tokens, do_sample=False)


def run(task: Task, model: Any, state: Any) -> None:
    """Do a task's calls and keep nothing."""
    for _ in task.calls(model, state):
        pass


def _one_by_one(start: int, stop: int) -> tuple[range, ...]:
    return tuple(range(position, position + 1) for position in range(start, stop))
