"""Which engines take part, and loading them; those whose package is missing are left out, with a line that says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from benchmarks.peers import ours
from benchmarks.peers.engines import CT2, HUGGINGFACE, PEERS, Q4, Q8, Engine, huggingface
from benchmarks.peers.files import path_of
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


def load(subject: Subject, names: Sequence[str], threads: int, context: int) -> list[Engine]:
    """Load engines, in order; our plans share one copy of the weights.

    Args:
        subject: the model, its files made.
        names: of the engines.
        threads: of each.
        context: tokens that must fit.
    """
    loaded: list[Engine] = []
    for name in names:
        path = path_of(name, subject)
        if name == HUGGINGFACE:
            loaded.append(huggingface(path, Q8))
        elif name in (Q8, Q4):
            from benchmarks.peers.llama_cpp_engine import LlamaCpp

            loaded.append(LlamaCpp(name, Q8, path, threads, context))
        elif name == CT2:
            from benchmarks.peers.ctranslate2_engine import CTranslate2

            loaded.append(CTranslate2(name, Q8, path, subject.floats, threads))
    mine = [name for name in names if ours.is_ours(name)]
    if mine:
        loaded += ours.engines(subject, path_of(mine[0], subject), mine)
    for engine in loaded:
        if engine.baseline not in names:
            engine.baseline = engine.name
    return loaded


def versions() -> dict[str, str | None]:
    """Return the versions of the peers' packages, None where one is missing."""
    return {name: _version(name) for name in _DISTRIBUTIONS.values()}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
