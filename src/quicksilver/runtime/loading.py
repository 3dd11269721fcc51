"""From a name to a running model: embedded models, local folders, the hub, or a model already in memory.

Only safetensors are read, and no code from a model's folder is run.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quicksilver.core.plan import Plan
from quicksilver.errors import FittedElsewhereWarning, ModelError, UnsupportedModelError
from quicksilver.models import registry
from quicksilver.models.fingerprint import fingerprint
from quicksilver.models.nesting import nest
from quicksilver.models.spec import Adapter
from quicksilver.ops import native
from quicksilver.ops.native import KernelChoice
from quicksilver.quant.config import QuantizationConfig, is_nested
from quicksilver.quant.storage import give_back
from quicksilver.runtime.generation import QuickSilverForCausalLM
from quicksilver.runtime.presets import resolve_plan

EMBEDDED = Path(__file__).parent.parent / "data" / "models"
_HUB_TIMEOUT_S = 10.0
_READ_SUFFIXES = (".json", ".safetensors", ".model")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def accelerate(
    model: Any,
    plan: Plan | str | os.PathLike[str] = "dense",
    special_ids: Sequence[int] | None = None,
    kernels: KernelChoice = "auto",
) -> QuickSilverForCausalLM:
    """Run a transformers model that is already loaded under a plan; no weight is changed.

    Weights are used in place; compiled kernels pack those that are nested for themselves, and anew where they find them
    changed when a sequence begins.

    Args:
        model: a GPT-2, Llama, Mistral, Qwen2 or Qwen3 causal language model.
        plan: a `Plan`, a preset's name, or the path of a plan file.
        special_ids: token ids never halted or fused where the plan protects them (default: the configuration's
            BOS, EOS and padding ids).
        kernels: which kernels read nested weights: the compiled ones where they can be used ("auto"), these or an error
            ("native"), or PyTorch's own ("torch").

    Raises:
        UnsupportedModelError: the family or an option of it is not supported.
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
    """Load a model from an embedded name, a local folder or a hub id, and run it under a plan.

    Where the plan chooses widths and the weights are plain, they are nested in memory.

    Args:
        path_or_id: "ref-llama" or another embedded name, a folder, or an id on the hub.
        plan: a `Plan`, a preset's name, or the path of a plan file.
        dtype: "float32", "bfloat16", "float16", or None for float32 on the CPU and the model's own elsewhere.
        device: "cpu", "cuda", "cuda:1", ...
        special_ids: token ids never halted where the plan protects them (default: the configuration's BOS, EOS
            and padding ids, and the special tokens of the tokenizer where there is one).
        kernels: which kernels read nested weights: the compiled ones where they can be used ("auto"), these or an error
            ("native"), or PyTorch's own ("torch").

    Raises:
        ModelError: the model cannot be found or read, or its weights are corrupt, missing or not finite.
        UnsupportedModelError: the family or an option of it is not supported.
        PlanError: the plan is unknown, malformed, or does not fit the model.
        KernelsUnavailableError: "native" kernels are asked for and cannot be used.

    Warns:
        FittedElsewhereWarning: the plan says that it was fitted to another model.
        KernelsMissingWarning: the compiled kernels would have been used and cannot be.
    """
    resolved = resolve_plan(plan, path_or_id)  # before the slow part
    if native.check_choice(kernels) == "native":
        native.extension()
    source, target = resolve_model(path_or_id), resolve_device(device)
    local = _local_only(source)
    model = _read_model(source, resolve_dtype(dtype, target), local)
    if resolved.precision is not None and not is_nested(model.config):
        nest(model, QuantizationConfig())
    try:
        if special_ids is None:
            special_ids = {*configured_special_ids(model), *_tokenizer_special_ids(source, local)}
        return accelerate(model.eval().to(target), resolved, sorted(special_ids), kernels)
    except ModelError as error:
        raise type(error)(f"{source}: {error}") from None


def load_plain(path_or_id: str | os.PathLike[str], device: str | torch.device = "cpu") -> Any:
    """Load a transformers model as it is, in its own dtype, to work on its weights.

    Raises:
        ModelError: the model cannot be found or read, its weights are corrupt, missing or not finite, or they are
            nested already.
        UnsupportedModelError: the family or an option of it is not supported.
    """
    source, target = resolve_model(path_or_id), resolve_device(device)
    local = _local_only(source)
    config = _read_config(source, local)
    if is_nested(config):
        raise ModelError(f"{source}: the model's weights are nested already")
    model = _read_plain(source, config, "auto", local)
    try:
        registry.adapt(model)
        check_finite(model, give_back)
    except ModelError as error:
        raise type(error)(f"{source}: {error}") from None
    return model.eval().to(target)


def load_tokenizer(path_or_id: str | os.PathLike[str]) -> Any:
    """Load a model's tokenizer.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    source = resolve_model(path_or_id)
    return _read_tokenizer(source, _local_only(source))


def _read_tokenizer(source: str, local: bool) -> Any:
    from transformers import AutoTokenizer

    absent = f"{source}: there is no tokenizer in this folder; save the model's there with save_pretrained"
    if os.path.isdir(source) and not any((Path(source) / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(absent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # the Rust tokenizers raise bare Exception on a corrupt file
        raise ModelError(f"{source}: cannot load the tokenizer: {first_line(error)}") from None
    if not tokenizer("a").input_ids:  # what transformers makes of too few tokenizer files
        raise ModelError(absent)
    return tokenizer


def _tokenizer_special_ids(source: str, local: bool) -> list[int]:
    try:
        return _read_tokenizer(source, local).all_special_ids
    except ModelError:
        return []


def check_fitted_to(plan: Plan, model: Any, adapter: Adapter) -> str | None:
    """Return why a plan's fitted thresholds mean nothing to a model; None where they may, or are not fitted."""
    if plan.fitted_to is None:
        return None
    problem = plan.fitted_to.mismatch(fingerprint(model, adapter.spec))
    return problem and f"plan {plan.name!r}: {problem}"


def embedded_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(p.parent.name for p in EMBEDDED.glob("*/config.json"))


def resolve_model(path_or_id: str | os.PathLike[str]) -> str:
    """Return the folder of an embedded or local model, or the hub id as it is.

    Raises:
        ModelError: it looks like a path and there is no such folder.
    """
    name = os.fspath(path_or_id)
    if name in embedded_models():
        return str(EMBEDDED / name)
    if _is_folder(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ModelError(f"{name}: the folder holds no config.json")
        return name
    if os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelError(f"{name or repr(name)}: no such model folder")
    return name


def _is_folder(name: str) -> bool:
    """Return whether a path leads to a folder; what is read of one must be readable.

    Raises:
        ModelError: permission is refused; the message names the file.
    """
    try:
        if not stat.S_ISDIR(os.stat(name).st_mode):
            return False
        files = sorted(path for path in Path(name).iterdir() if path.suffix in _READ_SUFFIXES and path.exists())
    except PermissionError as error:
        raise ModelError(f"{error.filename}: {error.strerror}") from None
    except (OSError, ValueError):  # not there; too long a name, or one with a null character
        return False
    for path in files:
        if not os.access(path, os.R_OK):
            raise ModelError(f"{path}: Permission denied")
    return True


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device; "auto" is the GPU where there is one.

    Raises:
        ModelError: the name is no device, or the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ModelError(f"{device!r} is not a device; use cpu, cuda or cuda:N") from None
    if target.type not in ("cpu", "cuda"):
        raise ModelError(f"device {str(device)!r} is not supported; use cpu, cuda or cuda:N")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {str(device)!r} was asked for, but PyTorch sees no GPU")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return target


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """Return the dtype to load in; "auto" stands for the model's own.

    Raises:
        ModelError: the name is not float32, bfloat16 or float16.
    """
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


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def hub_answers(kind: str, repo_id: str) -> str | None:
    """Ask the hub for a "model" or "dataset", once and with a short time limit.

    Returns:
        None where the hub has it, else the reason in one line.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        (api.model_info if kind == "model" else api.dataset_info)(repo_id, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # network, offline mode, unknown name, refused access: all mean no
        return first_line(error)
    return None


def _local_only(source: str) -> bool:
    """Whether a model must come from disk: a folder, or an earlier download when the hub does not answer."""
    if os.path.isdir(source):
        return True
    reason = hub_answers("model", source)
    if reason is None:
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, "config.json")
    except HFValidationError as error:
        raise ModelError(f"{source}: neither a local folder nor a hub id: {first_line(error)}") from None
    if isinstance(cached, str):
        return True
    known = ", ".join(embedded_models()) or "none"
    raise ModelError(
        f"{source}: not a local folder or an embedded model ({known}), and the hub did not provide it: {reason}"
    )


def _read_model(source: str, dtype: torch.dtype | str, local: bool) -> Any:
    """Read configuration and safetensors weights, plain or nested; refuse anything unexpected."""
    config = _read_config(source, local)
    if not is_nested(config):
        return _read_plain(source, config, dtype, local)
    from quicksilver.runtime.nested import load_nested

    return load_nested(_folder(source, local), config, dtype)


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
    registry.check_family(config)
    if getattr(config, "quantization_config", None) is not None and not is_nested(config):
        raise UnsupportedModelError(f"{source}: weights quantized by another package are not supported")
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


def _read_plain(source: str, config: Any, dtype: torch.dtype | str, local: bool) -> Any:
    from transformers import AutoModelForCausalLM

    if os.path.isdir(source) and not list(Path(source).glob("*.safetensors")):
        raise ModelError(f"{source}: no .safetensors weights (other formats are not read)")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except Exception as error:  # a configuration may ask for anything, and a file may hold anything
        raise ModelError(f"{source}: cannot read the weights: {first_line(error)}") from None
    for kind in ("missing_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(str(name) for name in sorted(info[kind], key=str)[:3])
            raise ModelError(f"{source}: the weight files do not fit the model; {kind.replace('_', ' ')}: {names}")
    return model
