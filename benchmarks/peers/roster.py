"""Which engines take part, and loading them; those whose package is missing are left out, with a line that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from benchmarks.peers import ctranslate2_engine, llama_cpp_engine, ours
from benchmarks.peers.engines import CT2, HUGGINGFACE, PEERS, Q4, Q8, Engine, huggingface
from benchmarks.peers.files import path_of
from benchmarks.peers.remote import RemoteEngine, worker
from benchmarks.peers.subjects import Subject

PEER_GROUP, OUR_GROUP = "peers", "ours"
_MODULES = {HUGGINGFACE: (), Q8: ("llama_cpp", "gguf"), Q4: ("llama_cpp", "gguf"), CT2: ("ctranslate2",)}
_DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "ctranslate2": "ctranslate2"}


def select(subject: Subject, wanted: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Return the engines that run a subject, peers first, baselines before what is compared with them.

    Args:
        subject: the model.
        wanted: names, or "peers" and "ours" for all of them; empty for everything.
        say: told why an engine is left out.

    Raises:
        ValueError: a name is none of them.
    """
    known = [*PEERS, *ours.plan_names(subject)]
    groups = {PEER_GROUP: PEERS, OUR_GROUP: ours.plan_names(subject)}
    chosen = [name for each in wanted or groups for name in groups.get(each, (each,))]
    for name in chosen:
        if name not in known and name not in ours.RANDOM_PLANS:
            raise ValueError(f"{name} is no engine; there are {', '.join((*known, *groups))}")
    chosen += [name.removesuffix(ours.HALF) for name in chosen]  # a plan with halting needs the one without
    taking_part = []
    for name in known:
        absent = [module for module in _MODULES.get(name, ()) if find_spec(module) is None]
        if name in chosen and absent:
            say(f"{name} is left out: pip install {' '.join(_DISTRIBUTIONS[module] for module in absent)}")
        elif name in chosen:
            taking_part.append(name)
    return taking_part


class Family(NamedTuple):
    """Engines that share a process: those of one package.

    Attributes:
        name: as in messages.
        load: returns them, in order; our plans share one copy of the weights.
    """

    name: str
    load: Callable[[], Sequence[Engine]]


def families(subject: Subject, names: Sequence[str], threads: int, context: int) -> list[Family]:
    """Return the families that engines belong to, in order, to be loaded here or elsewhere.

    Args:
        subject: the model, its files made.
        names: of the engines.
        threads: of each.
        context: tokens that must fit.
    """
    found = []
    files = [(name, path_of(name, subject)) for name in names]
    gguf = [(name, path) for name, path in files if name in (Q8, Q4)]
    mine = [(name, path) for name, path in files if ours.is_ours(name)]
    if HUGGINGFACE in names:
        found.append(Family(HUGGINGFACE, partial(huggingface, path_of(HUGGINGFACE, subject), Q8, threads)))
    if gguf:
        found.append(Family("llama.cpp", partial(llama_cpp_engine.load, gguf, Q8, threads, context)))
    if CT2 in names:
        ct2 = partial(ctranslate2_engine.load, CT2, Q8, path_of(CT2, subject), subject.floats, threads)
        found.append(Family("ctranslate2", ct2))
    if mine:
        (_, quantized), *_ = mine
        found.append(
            Family("quicksilver", partial(ours.engines, subject, quantized, [name for name, _ in mine], threads))
        )
    return found


def load(subject: Subject, name: str, threads: int, context: int) -> Engine:
    """Load one engine into this process; the arguments are those of `families`."""
    (family,) = families(subject, [name], threads, context)
    (engine,) = family.load()
    return engine


@contextmanager
def apart(subject: Subject, names: Sequence[str], threads: int, context: int) -> Iterator[list[RemoteEngine]]:
    """Have each family loaded in a process of its own; the arguments are those of `families`.

    Raises:
        WorkerError: such a process failed or died.
    """
    with ExitStack() as stack:
        engines = [
            engine
            for family in families(subject, names, threads, context)
            for engine in stack.enter_context(worker(*family))
        ]
        for engine in engines:
            if engine.baseline not in names:
                engine.baseline = engine.name
        yield engines


def versions() -> dict[str, str | None]:
    """Return the versions of the peers' packages, None where one is missing."""
    return {name: _version(name) for name in _DISTRIBUTIONS.values()}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
