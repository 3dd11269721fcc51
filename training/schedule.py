"""Where a run stands: the share done, the learning-rate factor there, and the stage in force.

Plain arithmetic only; clocks and optimisers belong to the training loop.
"""

from __future__ import annotations

import math

from training.config import ScheduleConfig, StageConfig


def share_done(step: int, steps: int, elapsed: float, time_limit: float) -> float:
    """Return how much of the run is over, 0 to 1: by steps, by seconds, or whichever is further on."""
    by_steps = step / steps if steps else 0.0
    by_time = elapsed / time_limit if time_limit else 0.0
    return min(1.0, max(by_steps, by_time))


def lr_factor(step: int, share: float, config: ScheduleConfig) -> float:
    """Return the learning-rate factor before step `step` (from 0): the lower of warm-up and decay.

    Warm-up goes by steps, since compiling can take a good share of a timed run; decay goes by `share`.
    """
    warmed = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    return min(warmed, _decay_factor(share, config))


def _decay_factor(share: float, config: ScheduleConfig) -> float:
    if share <= config.decay_from:
        return 1.0
    decayed = (share - config.decay_from) / (1.0 - config.decay_from)
    if config.decay == "cosine":
        decayed = 0.5 * (1.0 - math.cos(math.pi * decayed))
    return 1.0 + (config.final - 1.0) * decayed


def stage_at(share: float, stages: tuple[StageConfig, ...]) -> StageConfig:
    """Return the stage in force at `share` of the run."""
    return next((stage for stage in stages if share < stage.until), stages[-1])
