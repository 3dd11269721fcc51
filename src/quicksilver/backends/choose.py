"""Which backend runs a model's layers under a plan, and why not a faster one: decided here, and nowhere else."""

from collections.abc import Collection

from quicksilver.backends.base import LayerBackend
from quicksilver.backends.native import NativeBackend, unsupported_reason
from quicksilver.backends.resolved import ResolvedPlan
from quicksilver.backends.torch import TorchBackend
from quicksilver.families.spec import Adapter
from quicksilver.ops import AttentionBackend


def choose(adapter: Adapter, plan: ResolvedPlan, asked: Collection[int], attention: AttentionBackend) -> LayerBackend:
    """Return who runs a model's layers under a plan, where steps are asked after some of them."""
    reason = unsupported_reason(adapter, plan)
    in_torch = TorchBackend(adapter, plan, attention, reason)
    return in_torch if reason is not None else NativeBackend(adapter, plan, asked, in_torch)
