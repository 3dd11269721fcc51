"""The model `quicksilver` of lm-evaluation-harness: importing this module registers it, running it runs the harness.

    python -m quicksilver.integrations.lm_eval --model quicksilver --model_args pretrained=ref-llama,plan=strong ...

Tasks, requests and metrics are the harness's, and so is what is done with a model's logits.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

import torch

from quicksilver.core.sources import is_gguf
from quicksilver.errors import InputError, QuickSilverError
from quicksilver.loading.load import load, load_tokenizer, resolve_device, resolve_model
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.ops.native import KernelChoice
from quicksilver.plan import Plan
from quicksilver.plan.presets import resolve_plan
from quicksilver.version import __version__


def _fail(message: str) -> NoReturn:
    print(f"quicksilver: error: {message}", file=sys.stderr)
    sys.exit(2)


try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string
except ImportError as error:
    problem = f"lm-evaluation-harness cannot be imported ({error}); pip install 'quicksilver-llm[lm-eval]'"
    if __name__ == "__main__":
        _fail(problem)
    raise ImportError(problem) from error

_OWN = ("pretrained", "plan", "dtype", "device", "kernels", "tokenizer", "batch_size", "max_length", "add_bos_token")
_HARNESS = (
    "max_batch_size",
    "truncation",
    "logits_cache",
    "softmax_dtype",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""Arguments that are the harness's business; the others that it has for its own models change how those are loaded."""
_DEFAULT_DEVICE = "cuda:0"
"""What the harness's command line says where --device is not given, whatever the machine has."""
_SOFTMAX_DTYPES = ("float32", "float64", "bfloat16", "float16")

_HarnessLM: Any = HFLM
"""The harness's class; of its type, which its decorator narrows to that of every model, nothing of use is known."""


@register_model("quicksilver")
class QuickSilverLM(_HarnessLM):
    """A model under a plan, for the harness: its requests are those of `HFLM`, batch by batch.

    Args:
        pretrained: an embedded model's name, a folder, plain or quantized, an id on the hub, or a model that
            `quicksilver.load` or `quicksilver.accelerate` gave; the plan, dtype, device and kernels are its own then.
        plan: a `Plan`, a preset's name, or the path of a plan file.
        dtype: as `quicksilver.load` takes it.
        device: "cpu", "cuda", "cuda:1", ..., or "auto".
        kernels: which kernels read any-precision weights: "auto", "native" or "torch".
        tokenizer: of another model, or a tokenizer (default: the model's).
        batch_size: sequences of a batch, or "auto" or "auto:N" for the most that memory holds.
        max_length: tokens of a request at most (default: the model's context).
        add_bos_token: whether texts begin with BOS (default: as the tokenizer has it).
        **others: `max_batch_size`, `truncation`, `logits_cache`, `softmax_dtype`, `prefix_token_id`,
            `think_end_token`, `enable_thinking` and `chat_template_args` of `HFLM`.

    Raises:
        InputError: an argument that is unknown, not supported or of no use here.
        ModelError: the model or its tokenizer cannot be loaded.
        PlanError: the plan is unknown, malformed, or does not fit the model.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | QuickSilverForCausalLM | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        kernels: KernelChoice | None = None,
        tokenizer: Any = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        **others: Any,
    ) -> None:
        _check(batch_size, max_length, add_bos_token, others)
        self._totals: Counter[str] = Counter()
        given: Any = pretrained
        if isinstance(pretrained, QuickSilverForCausalLM):
            for name, value in {"plan": plan, "dtype": dtype, "device": device, "kernels": kernels}.items():
                if value is not None and not (name == "device" and resolve_device(value) == pretrained.device):
                    raise InputError(f"{name}={value} is of no use with a model that is loaded already")
            device = pretrained.device
        else:
            given = _source(pretrained)
            plan = resolve_plan("dense" if plan is None else plan, pretrained)
            device = resolve_device("cpu" if device is None else device)
            self._load = partial(load, plan=plan, dtype=dtype, kernels=kernels or "auto")
        super().__init__(
            pretrained=given,
            device=str(device),
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
            **others,
        )
        if kernels == "native" and not self.model.adapter.spec.is_quantized:
            raise InputError(
                f"kernels=native: {pretrained} has no any-precision weights, which are all that these kernels read"
            )
        limit = self.model.adapter.spec.max_positions
        if max_length is not None and max_length > limit:
            raise InputError(f"max_length={max_length} is longer than the model's context of {limit}")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> QuickSilverLM:
        """Make the model of --model_args, which go before options of their names: those may be defaults."""
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == _DEFAULT_DEVICE and not torch.cuda.is_available():
            del options["device"]
        return cls(**{**options, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> QuickSilverLM:
        """Make the model of --model_args as they were typed."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        """Tokens of a request at most."""
        return self._max_length or self.model.adapter.spec.max_positions

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results' "config" says of the model, what its plan saved in it; print that too.

        The harness asks once, when all requests have been answered. Tokens that pad a batch are counted.
        """
        totals, model = self._totals, self.model
        tokens, dense = max(totals["tokens"], 1), max(totals["dense_flops"], 1)
        info = {
            "version": __version__,
            "plan": model.plan.name,
            "plan_hash": model.plan.hash,
            "kernels": model.adapter.kernels,
            "device": str(model.device),
            "batch_size": self.batch_size,
            "tokens": totals["tokens"],
            "num_layers": model.adapter.spec.num_layers,
            "mean_depth": totals["layers"] / tokens,
            "flops": totals["flops"],
            "dense_flops": totals["dense_flops"],
            "flops_reduction": 1.0 - totals["flops"] / dense if totals["tokens"] else 0.0,
        }
        print(
            f"quicksilver: plan {info['plan']}: {info['tokens']} tokens, mean depth {info['mean_depth']:.2f} of"
            f" {info['num_layers']} layers, {info['flops_reduction']:+.2%} of the FLOPs saved",
            file=sys.stderr,
        )
        return {**super().get_model_info(), "quicksilver": info}

    def _get_config(self, pretrained: str, **_: Any) -> None:
        """Load the model, and with it its configuration."""
        self._model = self._load(pretrained, device=self._device)
        self._config = self._model.config

    def _create_model(self, *_: Any, **__: Any) -> None:
        """Do nothing: the model came with its configuration."""

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **options: Any) -> None:
        if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = resolve_model(tokenizer or getattr(pretrained, "name_or_path", pretrained))
            loaded = load_tokenizer(tokenizer)  # says in a line what is missing or damaged
            tokenizer = loaded if is_gguf(tokenizer) else tokenizer
        super()._create_tokenizer(pretrained, tokenizer, **options)

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(*args, **kwargs)
        self._count()
        return logits

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = super()._model_generate(*args, **kwargs)
        self._count()
        return tokens

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        totals = self._totals.copy()
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self._totals = totals  # trial batches answer nothing

    def _count(self) -> None:
        stats = self.model.stats
        self._totals.update(
            tokens=stats.tokens,
            layers=stats.mean_depth * stats.tokens,
            flops=stats.flops,
            dense_flops=stats.dense_flops,
        )


def main() -> None:
    """Run the harness's command line; deliberate errors print one line and exit with status 2."""
    problem = ""
    try:
        cli_evaluate()
    except QuickSilverError as error:
        problem = str(error)
    if problem:
        _fail(problem)  # on a line of its own: with the exception the harness's progress bars have gone


def _source(pretrained: object) -> str:
    """Return the folder or file of a model that is on disk, or its id on the hub."""
    if not isinstance(pretrained, (str, os.PathLike)) or not os.fspath(pretrained):
        raise InputError(f"pretrained={pretrained!r}: give an embedded model's name, a folder or an id on the hub")
    source = resolve_model(pretrained)
    return os.path.abspath(source) if os.path.exists(source) else source


def _check(batch_size: object, max_length: object, add_bos_token: object, others: Mapping[str, Any]) -> None:
    """Raise InputError where arguments are not known, not supported, or nothing that can be done."""
    known = inspect.signature(HFLM.__init__).parameters
    for name, value in others.items():
        if name in _HARNESS or (name in known and value in (None, known[name].default)):
            continue
        problem = "is not supported by quicksilver" if name in known else "is unknown"
        raise InputError(f"the model argument {name}={value} {problem}; it takes {', '.join((*_OWN, *_HARNESS))}")
    if not re.fullmatch(r"auto(:[1-9]\d*)?|[1-9]\d*", str(batch_size)):
        raise InputError(f"batch_size={batch_size} must be a number of sequences, auto or auto:N")
    if add_bos_token not in (None, True, False):
        raise InputError(f"add_bos_token={add_bos_token} must be True or False")
    for name, value in {"max_length": max_length, "max_batch_size": others.get("max_batch_size")}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name}={value} must be a whole number above 0")
    softmax_dtype = others.get("softmax_dtype")
    if softmax_dtype is not None and str(softmax_dtype).removeprefix("torch.") not in _SOFTMAX_DTYPES:
        raise InputError(f"softmax_dtype={softmax_dtype} must be one of {', '.join(_SOFTMAX_DTYPES)}")


if __name__ == "__main__":
    main()
