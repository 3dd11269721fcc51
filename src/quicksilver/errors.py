"""Errors the library raises on purpose; each message names the input at fault."""


class QuickSilverError(Exception):
    """Base of every deliberate error; the command line prints it and exits with status 2."""


class InputError(QuickSilverError, ValueError):
    """A text, token, prompt or option that cannot be used as given."""


class PlanError(QuickSilverError, ValueError):
    """A plan that is malformed, unknown, or does not fit the model."""


class ModelError(QuickSilverError, ValueError):
    """A model that cannot be found, read, or trusted (missing, corrupt or non-finite weights)."""


class UnsupportedModelError(ModelError):
    """A model family, or an option of one, that the runtime does not implement."""


class UnsupportedFeatureError(QuickSilverError, NotImplementedError):
    """A feature of transformers' interface that this runtime does not offer, such as beam search."""


class FittedElsewhereWarning(UserWarning):
    """A plan is run on another model than the one its thresholds were fitted to."""


class KernelsUnavailableError(QuickSilverError, RuntimeError):
    """Compiled kernels, or an instruction set of theirs, that were asked for and cannot be used."""


class KernelsMissingWarning(UserWarning):
    """Any-precision weights are read by PyTorch's own kernels, because the compiled ones cannot be used for them."""


class ByteOrderMarkWarning(UserWarning):
    """A text begins with a byte order mark, which is no part of it and was left out."""


class WeightFilesWarning(UserWarning):
    """Weight files hold what the configuration has no place for: tensors, or a head of its own where it is tied."""


class TokenizerWarning(UserWarning):
    """A model's file leaves something of its tokenizer open, or says something of it that makes no sense."""


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or its type's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
