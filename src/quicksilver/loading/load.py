"""From a name to a running model: embedded models, local folders and files, the hub, or a model in memory."""

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quicksilver.core.sources import check_device, is_gguf, is_local, resolve_model
from quicksilver.errors import FittedElsewhereWarning, ModelError, first_line
from quicksilver.families import registry
from quicksilver.families.fingerprint import fingerprint
from quicksilver.families.modules import causal_lm
from quicksilver.families.names import check_family
from quicksilver.families.quantize import quantize_model
from quicksilver.families.spec import Adapter
from quicksilver.loading.packed import is_packed, packed_model
from quicksilver.loading.plain import read_plain
from quicksilver.loading.tokenizers import read_special_ids, read_tokenizer
from quicksilver.model import QuickSilverForCausalLM
from quicksilver.ops import native
from quicksilver.ops.native import KernelChoice
from quicksilver.plan import Plan
from quicksilver.plan.presets import resolve_plan
from quicksilver.weights.config import LAYERS_ONLY, is_quantized
from quicksilver.weights.packed_settings import method_of, unsupported_method
from quicksilver.weights.storage import give_back

_QUANTIZED = "the model's weights are quantized already"


def accelerate(
    model: Any,
    plan: Plan | str | os.PathLike[str] = "dense",
    special_ids: Sequence[int] | None = None,
    kernels: KernelChoice = "auto",
) -> QuickSilverForCausalLM:
    """Run a transformers model that is already loaded under a plan; no weight is changed.

    Weights are used in place; compiled kernels pack quantized ones for themselves, and anew where they find them
    changed when a sequence begins. Linear maps, norms, activations, embeddings and the head are called as modules, on
    rows [N, d]: hooks on them run, and so do modules in their place, adapters for one. What is on a layer, on its
    attention or MLP, or on what is around them would not run, and is refused; so it is at the next pass where it came
    later.

    Args:
        model: a causal language model of a supported family (`quicksilver models`), or PEFT's wrapper of one.
        plan: a `Plan`, a preset's name, or the path of a plan file.
        special_ids: token ids never halted or fused where the plan protects them (default: the configuration's
            BOS, EOS and padding ids).
        kernels: which kernels read quantized weights: the compiled ones where they can be used ("auto"), these or an
            error ("native"), or PyTorch's own ("torch").

    Raises:
        UnsupportedModelError: the family or an option of it is not supported, or hooks, a `forward`, attention or
            adapters would not run.
        ModelError: a weight is NaN or infinite.
        PlanError: the plan is unknown, malformed, or does not fit the model.
        KernelsUnavailableError: "native" kernels are asked for and cannot be used.

    Warns:
        FittedElsewhereWarning: the plan says that it was fitted to another model.
        KernelsMissingWarning: the compiled kernels would have been used and cannot be.
    """
    if isinstance(model, QuickSilverForCausalLM):
        model = model.model
    resolved = resolve_plan(plan)
    adapter = registry.adapt(model, kernels)
    check_finite(model)
    if (problem := check_fitted_to(resolved, model, adapter)) is not None:
        warnings.warn(problem, FittedElsewhereWarning, stacklevel=2)
    ids = configured_special_ids(model) if special_ids is None else special_ids
    return QuickSilverForCausalLM(model, adapter, resolved, ids, kernels=kernels)


def load(
    path_or_id: str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str] = "dense",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    special_ids: Sequence[int] | None = None,
    kernels: KernelChoice = "auto",
) -> QuickSilverForCausalLM:
    """Load a model from an embedded name, a local folder or GGUF file, or a hub id, and run it under a plan.

    Where the plan chooses bits and the weights are plain, the layers' maps are quantized in memory; the head and the
    embedding are not. A folder of GPTQ or AWQ runs on the codes that it holds, nothing rounded anew.

    Args:
        path_or_id: "ref-llama" or another embedded name, a folder, a GGUF file (any of a set), or an id on the hub.
        plan: a `Plan`, a preset's name, or the path of a plan file.
        dtype: "float32", "bfloat16", "float16", or None for float32 on the CPU and the model's own elsewhere.
        device: "cpu", "cuda", "cuda:1", ...
        special_ids: token ids never halted where the plan protects them (default: the configuration's BOS, EOS
            and padding ids, and the special tokens of the tokenizer where there is one).
        kernels: which kernels read quantized weights: the compiled ones where they can be used ("auto"), these or an
            error ("native"), or PyTorch's own ("torch").

    Raises:
        ModelError: the model cannot be found or read, or its weights are corrupt, missing or not finite.
        UnsupportedModelError: the family or an option of it, or how the weights are quantized, is not supported.
        PlanError: the plan is unknown, malformed, or does not fit the model.
        KernelsUnavailableError: "native" kernels are asked for and cannot be used.

    Warns:
        FittedElsewhereWarning: the plan says that it was fitted to another model.
        KernelsMissingWarning: the compiled kernels would have been used and cannot be.
        WeightFilesWarning: the weight files hold something that the model has no place for, or zeros of GPTQ that
            programs read in different ways.
    """
    resolved = resolve_plan(plan, path_or_id)  # before the slow part
    if native.check_choice(kernels) == "native":
        native.extension()
    source, target = resolve_model(path_or_id), resolve_device(device)
    local = is_local(source)
    model = _read_model(source, resolve_dtype(dtype, target), local)
    if resolved.precision is not None and not is_quantized(model.config):
        quantize_model(model, LAYERS_ONLY)  # a plan chooses the bits of these; the head and the embedding stay floats
    try:
        if special_ids is None:
            special_ids = list({*configured_special_ids(model), *read_special_ids(source, local)})
        return accelerate(model.eval().to(target), resolved, sorted(special_ids), kernels)
    except ModelError as error:
        raise type(error)(f"{source}: {error}") from None


def load_plain(path_or_id: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Load a transformers model as it is, in its own dtype, to work on its weights.

    Raises:
        ModelError: the model cannot be found or read, its weights are corrupt, missing or not finite, or they are
            quantized already.
        UnsupportedModelError: the family or an option of it is not supported.

    Warns:
        WeightFilesWarning: the weight files hold something that the model has no place for.
    """
    source, target = resolve_model(path_or_id), resolve_device(device)
    local = is_local(source)
    if is_gguf(source):
        model = _read_gguf(source, "auto", allow_codes=False)
    else:
        config = _read_config(source, local)
        if is_quantized(config) or is_packed(source, config):
            raise ModelError(f"{source}: {_QUANTIZED}")
        model = read_plain(source, config, "auto", local)
    try:
        registry.adapt(model)
        check_finite(model, give_back)
    except ModelError as error:
        raise type(error)(f"{source}: {error}") from None
    return model.eval().to(target)


def load_taken_over(path_or_id: str | os.PathLike[str]) -> Any:
    """Load a folder of GPTQ or AWQ, or a GGUF file, with its codes as they are; None where a model is none of these.

    Raises:
        ModelError: the model cannot be found or read, or its weights are corrupt, missing or not finite.
        UnsupportedModelError: the family or an option of it, or how the weights are quantized, is not supported.

    Warns:
        WeightFilesWarning: as `load` does.
    """
    source = resolve_model(path_or_id)
    local = is_local(source)
    if not (_is_gguf_in_codes(source) if is_gguf(source) else is_packed(source, _read_config(source, local))):
        return None
    model = _read_model(source, "auto", local)
    if not is_quantized(model.config):
        raise ModelError(f"{source}: some maps of its layers are plain, others codes: it can be run, not written anew")
    try:
        registry.adapt(model)
        check_finite(model)
    except ModelError as error:
        raise type(error)(f"{source}: {error}") from None
    return model.eval()


def load_tokenizer(path_or_id: str | os.PathLike[str]) -> Any:
    """Load a model's tokenizer; ModelError where there is none, or it cannot be read."""
    source = resolve_model(path_or_id)
    return read_tokenizer(source, is_local(source))


def check_fitted_to(plan: Plan, model: Any, adapter: Adapter) -> str | None:
    """Return why a plan's fitted thresholds mean nothing to a model; None where they may, or are not fitted."""
    if plan.fitted_to is None:
        return None
    problem = plan.fitted_to.mismatch(fingerprint(causal_lm(model), adapter.spec))
    return problem and f"plan {plan.name!r}: {problem}"


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device, "auto" being the GPU where there is one; ModelError where there is no such device."""
    check_device(str(device))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(device)!r} was asked for, but PyTorch sees no GPU")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return target


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """Return the dtype to load in, "auto" standing for the model's own; ModelError for another name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise ModelError(f"dtype {dtype!r} is not supported; use float32, bfloat16, float16 or auto")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def configured_special_ids(model: Any) -> tuple[int, ...]:
    """Return the BOS, EOS and padding ids that a model's configurations name."""
    ids: set[int] = set()
    for config in (model.config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            values = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
            if not all(isinstance(token, int) for token in values):
                raise ModelError(f"{name} must be token ids, got {value!r}")
            ids.update(values)
    return tuple(sorted(ids))


def check_finite(model: Any, after: Callable[[Tensor], None] = lambda weight: None) -> None:
    """Raise ModelError naming the first weight that holds NaN or infinity; call `after` with each that does not."""
    for name, parameter in model.named_parameters():
        bounds = torch.stack(parameter.detach().aminmax())  # unlike isfinite, without a copy of the weight
        if not bool(torch.isfinite(bounds).all()):
            raise ModelError(f"weight {name!r} holds NaN or infinite values")
        after(parameter)


def _read_model(source: str, dtype: torch.dtype | str, local: bool) -> Any:
    """Read configuration and weights, plain or quantized, by us, as GPTQ and AWQ do, or in a GGUF file."""
    if is_gguf(source):
        return _read_gguf(source, dtype)
    config = _read_config(source, local)
    if is_packed(source, config):
        return packed_model(_folder(source, local), dtype)
    if not is_quantized(config):
        return read_plain(source, config, dtype, local)
    from quicksilver.loading.quantized import load_quantized

    return load_quantized(_folder(source, local), config, dtype)


def _is_gguf_in_codes(source: str) -> bool:
    from quicksilver.loading.gguf.model import GgufModel

    return GgufModel(source).is_quantized


def _read_gguf(source: str, dtype: torch.dtype | str, allow_codes: bool = True) -> Any:
    """Read a GGUF file, codes as they are and the rest in float32 unless a dtype is named."""
    from quicksilver.loading.gguf import model as gguf

    model = gguf.GgufModel(source)
    if model.is_quantized and not allow_codes:
        raise ModelError(f"{source}: {_QUANTIZED}")
    if model.is_quantized:
        return gguf.codes_model(model, dtype)
    made = gguf.float_model(model)
    return made if isinstance(dtype, str) else made.to(dtype)


def _read_config(source: str, local: bool) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    try:
        stored = PreTrainedConfig.get_config_dict(source, local_files_only=local)[0].get("quantization_config")
        config = None
        if stored is None or isinstance(stored, dict):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # configuration classes validate with exceptions of many kinds
        raise ModelError(f"{source}: cannot read the configuration: {first_line(error)}") from None
    if config is None:
        raise ModelError(f"{source}: config.json: quantization_config must be an object, got {type(stored).__name__}")
    check_family(config)
    if stored is not None and not is_quantized(config) and not is_packed(source, config):
        raise unsupported_method(source, method_of(stored))
    return config


def _folder(source: str, local: bool) -> str:
    """Return the folder of a model's files, downloaded first where it is a hub id."""
    if os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, allow_patterns=["*.json", "*.safetensors"], local_files_only=local)
    except Exception as error:  # network, full disk, refused access
        raise ModelError(f"{source}: cannot download the weights: {first_line(error)}") from None
