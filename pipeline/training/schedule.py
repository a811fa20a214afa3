"""Learning-rate schedules: pure functions of the images seen."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]


def learning_rate(
    images_seen: int, peak: float, schedule: Schedule, warmup_images: int, total_images: int
) -> float:
    """Linear warm-up to `peak`, then constant or half a cosine down to 0 at `total_images`."""
    warmup = min(1.0, (images_seen + 1) / max(1, warmup_images))
    if schedule == "constant":
        return peak * warmup
    progress = min(1.0, images_seen / max(1, total_images))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def is_due(every: int, before: int, after: int) -> bool:
    """True if a multiple of `every` images lies in (before, after]; 0 = never."""
    return every > 0 and after // every > before // every
