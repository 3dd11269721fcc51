"""Where a plan's thresholds come from: what `plan fit` leaves in a plan for whoever runs it later.

It changes nothing that a plan does. How a model is told from another is `families/fingerprint.py`'s business.
"""

from dataclasses import dataclass

from quicksilver.errors import PlanError


@dataclass(frozen=True)
class FittedTo:
    """The model and the text that thresholds were fitted to; PlanError where a value is of another type."""

    model: str  # its name, for people
    fingerprint: str  # tells it from others
    calibration: str  # the text's name, or how it was made
    tokens: int  # of that text, how many were used

    def __post_init__(self) -> None:
        for name in ("model", "fingerprint", "calibration"):
            if not isinstance(getattr(self, name), str):
                raise PlanError(f"{name} must be a string, got {getattr(self, name)!r}")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise PlanError(f"tokens must be a whole number above 0, got {self.tokens!r}")

    def mismatch(self, fingerprint: str) -> str | None:
        """Return what to say where a plan with this record is run on the model of a fingerprint; None if it fits."""
        if fingerprint == self.fingerprint:
            return None
        return (
            f"its thresholds were fitted to another model ({self.model}, {self.fingerprint}) than this one"
            f" ({fingerprint}); they are absolute and mean something else here: fit it anew with the shell command"
            " `quicksilver plan fit`"
        )
