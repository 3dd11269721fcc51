"""Which of a model's modules the runtime calls and which it runs itself, and whether these are still transformers' own.

Linear maps, norms, activations, embeddings and the head are called as modules. A layer, its attention, its MLP and all
around them the runtime runs itself: what somebody has hung on these, or put in their place, would not run, and is
refused by name. What a model's weights are, `weights.py` says.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quicksilver.errors import UnsupportedModelError
from quicksilver.families.family import Family, family_of, modeling_module
from quicksilver.families.weights import WeightPlaces
from quicksilver.weights import AnyPrecisionLinear, AnyPrecisionSplit

_INDEX = re.compile(r"\.\d+(?=\.|$)")
_LIBRARIES = ("torch", "transformers", "peft", "quicksilver")
_INERT = "transformers.utils.output_capturing"  # its hooks stay where outputs were asked for once, and do nothing
_FUNCTIONS = (
    "apply_rotary_pos_emb",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "eager_attention_forward",
    "repeat_kv",
    "rotate_half",
)
"""What forward passes of transformers' modules call by name, where they do."""
_CALLED = "linear maps, norms, activations, embeddings and the head"
_forward_of = attrgetter("forward")
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
)


@dataclass(frozen=True)
class _Place:
    """A module and where it is; `stands_for` as in `Family.run`, None where the runtime calls it."""

    name: str
    module: nn.Module
    stands_for: str | None


class ModuleWatch:
    """The modules of a model as the runtime found them; says when they are others, or are watched by somebody.

    The model may be in PEFT's wrapper. `bypasses`: compiled kernels read the weights of called modules too, past these
    modules; `is_stale`: modules were replaced before this was made, as in a copy.

    Raises:
        UnsupportedModelError: what would not run; the message names the module.
    """

    def __init__(self, model: Any, bypasses: bool, is_stale: bool = False) -> None:
        self._arguments, self._is_stale = (model, bypasses), is_stale
        base = causal_lm(model)
        self._adapters: Mapping[str, Any] = {} if base is model else model.peft_config
        self._config, self._weights = base.config, WeightPlaces(base)
        self._looked_up, self._family = _LookedUp(base.config), base.config.model_type
        places = list(_places(model, base, family_of(base.config)))
        self._run = [place for place in places if place.stands_for is not None]
        self._called = [place.module for place in places if place.stands_for is None] if bypasses else []
        self._modules = [*(place.module for place in self._run), *self._called]
        self._children = [module._modules for module in self._modules if module._modules]
        self._known = self._found()
        self._classes = list(set(map(type, self._modules)))
        self._look()

    def __reduce__(self) -> tuple[type[ModuleWatch], tuple[Any, ...]]:
        """Say how copies are made: what is watched is known by identity."""
        return type(self), (*self._arguments, self.is_replaced)

    @property
    def is_replaced(self) -> bool:
        """Whether modules, windows, or the weights' dtype or device are not what was found; 0.01 ms for 12 layers."""
        return self._is_stale or self._found() != self._known

    def check(self) -> None:
        """Look where something has changed; UnsupportedModelError names what would not run. 0.01 ms if nothing has."""
        if self.is_replaced:
            raise UnsupportedModelError(
                f"{self._family}: modules of the model, its dtype or device, or windows that it declares have changed"
                " since it was accelerated; accelerate it again"
            )
        self.check_hung()

    def check_hung(self) -> None:
        """Look again where something was hung on modules, or weights are others; modules are known to be the same."""
        self._weights.check()
        hooked = any(self._empty) or list(map(tuple, self._filled)) != self._hooks
        # By `map`, not by a generator: it is asked at every token of every sequence.
        if hooked or True in map(contains, self._bare, repeat("forward")) or self._functions() != self._defined:
            self._look()

    def check_hooks(self) -> None:
        """Look again where a hook was registered since, on whatever; where none was, it costs next to nothing."""
        if self.is_observed or RemovableHandle.next_id != self._next_hook:
            self.check()
            self._next_hook = RemovableHandle.next_id

    def _found(self) -> list[object]:
        """Return the modules' children and classes, the weights' form, and what the configuration says of windows."""
        config, modules = vars(self._config), chain.from_iterable(map(dict.values, self._children))
        windows = config.get("sliding_window"), *(config.get("layer_types") or ())
        return [*modules, *map(type, self._modules), *self._weights.form, *windows]

    def _look(self) -> None:
        """Refuse what would not run; remember what hangs on the modules, to notice when it is something else."""
        self._next_hook = -1  # none, unless all is well
        causal_lm(self._arguments[0])
        for place in self._run:
            _check(place, self._config)
        _check_global_hooks(self._family)
        self._looked_up.check()
        self.is_observed = any(is_observed(each) or not _is_library(type(each).forward) for each in self._called)
        hooks = [*chain.from_iterable(map(_hooks, self._modules)), *_GLOBAL_HOOKS]
        self._empty = [each for each in hooks if not each]
        self._filled = [each for each in hooks if each]
        self._hooks = list(map(tuple, self._filled))
        self._bare = [vars(module) for module in self._modules if "forward" not in vars(module)]
        self._defined, self._next_hook = self._functions(), RemovableHandle.next_id

    def _functions(self) -> list[object]:
        """Return what the modules' forward passes are, and what these look up when they run."""
        return [*map(_forward_of, self._classes), *self._looked_up.found(), *self._adapters]


def causal_lm(model: Any) -> Any:
    """Return the causal language model of transformers that was given, or that PEFT has put adapters into."""
    from transformers import PreTrainedModel

    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return _adapted(model)
    if isinstance(model, PreTrainedModel):
        return model
    name = type(model).__name__
    inner = [each for each in ("_orig_mod", "module") if isinstance(getattr(model, each, None), nn.Module)]
    if isinstance(model, nn.Module) and inner:
        raise UnsupportedModelError(
            f"{name} wraps a model, and would not run; give the model itself (.{inner[0]}), whole and on one device"
        )
    raise UnsupportedModelError(f"a causal language model of transformers is needed, not {name}")


def is_observed(module: nn.Module) -> bool:
    """Whether calling a module does more, or other, than its class's `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def runs_only(module: nn.Module, source: str) -> bool:
    """Whether calling a module is the `forward` of a class that is defined in a Python module `source`, and no more."""
    return not is_observed(module) and defined_in(type(module).forward) == source


def defined_in(function: Any) -> str:
    """Return the name of the Python module whose code a function is; its `__module__` may be that of what it wraps."""
    while not hasattr(function, "__globals__") and hasattr(function, "func"):  # functools.partial
        function = function.func
    return getattr(function, "__globals__", {}).get("__name__", "")


def float_weight(module: nn.Module, otherwise: nn.Module) -> Tensor:
    """Return the first weight of a module, or of another where that has none, by which to know dtype and device."""
    return next(p for p in chain(module.parameters(), otherwise.parameters()) if p.is_floating_point())


def _adapted(model: Any) -> Any:
    """Return the model in PEFT's wrapper, where the adapters are modules of it and all that there is."""
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None) is not None:
            raise UnsupportedModelError(
                f"PEFT: adapter {name!r} ({kind}) depends on the prompt or changes it, and would not run;"
                " adapters that replace modules are supported"
            )
    tuner = model.base_model
    if "forward" in vars(tuner) or defined_in(type(tuner).forward) != "peft.tuners.tuners_utils":
        raise UnsupportedModelError(
            f"PEFT: the forward of {type(tuner).__name__} does more than the model's, and would not run; where the"
            " adapter can be merged (merge_and_unload), accelerate the model that this returns"
        )
    return causal_lm(tuner.model)


def _places(model: nn.Module, base: nn.Module, family: Family) -> Iterator[_Place]:
    """Give the modules that the runtime runs or calls, PEFT's wrappers first."""
    outer = model
    prefix = ""
    while outer is not base:
        yield _Place(prefix.removesuffix(".") or "the model", outer, "")
        child = "base_model" if prefix == "" else "model"
        outer, prefix = getattr(outer, child), f"{prefix}{child}."
    called = (*family.map_paths, *family.called)
    for name, module in base.named_modules():
        path, full = _INDEX.sub(".*", name), (prefix + name).removesuffix(".") or "the model"
        if path in family.run:
            yield _Place(full, module, family.run[path])
        elif isinstance(module, AnyPrecisionSplit):  # its parts are called
            yield _Place(full, module, "")
            yield from (_Place(f"{full}.parts.{i}", part, None) for i, part in enumerate(module.parts))
        elif path in called:
            yield _Place(full, module, None)


def check_quantized_maps(base: nn.Module, family: Family) -> None:
    """Raise UnsupportedModelError naming the first map of a layer that is not quantized, where others are."""
    for name, module in base.named_modules():
        if _INDEX.sub(".*", name) in family.map_paths and not isinstance(
            module, (AnyPrecisionLinear, AnyPrecisionSplit)
        ):
            raise UnsupportedModelError(
                f"{name!r} is {type(module).__name__} where the model's other maps are quantized; merge adapters and"
                " put back replaced modules before a model is quantized"
            )


def _check(place: _Place, config: Any) -> None:
    """Raise UnsupportedModelError where something on a module that the runtime runs itself would not run."""
    name, module, family = place.name, place.module, config.model_type
    instead = f"the runtime runs this module itself and calls {_CALLED} only"
    if hasattr(module, "_hf_hook"):
        raise UnsupportedModelError(
            f"{family}: {name!r} has a hook of accelerate's (offloading, or a device map), which would not run; load"
            " the model onto one device, or accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    if not _is_original(module, place.stands_for or "", modeling_module(config)):
        raise UnsupportedModelError(
            f"{family}: the forward of {name!r} ({type(module).__name__}) is not that of transformers'"
            f" {place.stands_for or 'own module'} and would not run: {instead}; put transformers' back"
        )
    for hook in chain.from_iterable(each.values() for each in _hooks(module)):
        if defined_in(hook) != _INERT:
            raise UnsupportedModelError(
                f"{family}: a forward hook on {name!r} would not run: {instead}; remove it, or put it on one of those"
            )


def _is_original(module: nn.Module, wanted: str, source: str) -> bool:
    """Whether calling a module is transformers' `forward` of a class, or of any of a library's where none is wanted."""
    if "forward" in vars(module) or not _is_library(type(module).__call__):
        return False
    functions = _unwrapped(type(module).forward)
    innermost = functions[-1]
    if not all(map(_is_library, functions)):
        return False
    return wanted == "" or (innermost.__module__, innermost.__qualname__) == (source, f"{wanted}.forward")


def _check_global_hooks(family: str) -> None:
    """Raise UnsupportedModelError where hooks on all modules would run on some; PyTorch's own counters may."""
    for hook in chain.from_iterable(each.values() for each in _GLOBAL_HOOKS):
        if not _is_library(hook):
            raise UnsupportedModelError(
                f"{family}: a forward hook on all modules (register_module_forward_hook or _pre_hook) would run on"
                f" {_CALLED} only, not on layers; remove it while this model runs"
            )


class _LookedUp:
    """Functions that a family's forward passes look up when they run: attention, its mask, and some by name."""

    def __init__(self, config: Any) -> None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._config, self._interfaces = config, (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        self._modeling = sys.modules[modeling_module(config)]
        self._by_name = vars(self._modeling)

    def found(self) -> list[Any]:
        attention = self._config._attn_implementation
        return [*(each.get(attention) for each in self._interfaces), *map(self._by_name.get, _FUNCTIONS)]

    def check(self) -> None:
        """Raise UnsupportedModelError naming the first that is not transformers'."""
        attention = self._config._attn_implementation
        of_attention = f"the attention {attention!r}", f"the mask of attention {attention!r}"
        names = *of_attention, *(f"{self._modeling.__name__}.{name}" for name in _FUNCTIONS)
        for name, function in zip(names, self.found(), strict=True):
            if function is not None and not all(map(_is_library, _unwrapped(function))):
                raise UnsupportedModelError(
                    f"{self._config.model_type}: {name} is not transformers' own and would not run: the runtime has"
                    " attention of its own; put transformers' back, model.set_attn_implementation('sdpa') say"
                )


def _hooks(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]:
    return module._forward_hooks, module._forward_pre_hooks


def _unwrapped(function: Any) -> list[Any]:
    """Return a function, what it wraps, what that wraps, and so on."""
    functions = [function]
    while (inner := getattr(functions[-1], "__wrapped__", None) or getattr(functions[-1], "func", None)) is not None:
        functions.append(inner)
    return functions


def _is_library(function: Any) -> bool:
    return defined_in(function).partition(".")[0] in _LIBRARIES
