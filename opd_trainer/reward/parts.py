"""What users' functions and servers return, as parts of a reward."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from opd_trainer.errors import WorkerError


def parts_of(value: Any, source: str) -> dict[str, float]:
    """A number or an object with "reward" as parts by name.

    Raises:
        WorkerError: it is neither, or not finite.
    """
    parts = dict(value) if isinstance(value, Mapping) else {"reward": value}
    if "reward" not in parts:
        raise WorkerError(f"{source} returned {sorted(parts)} without 'reward'")
    for name, part in parts.items():
        if not isinstance(part, Real) or not math.isfinite(part):
            raise WorkerError(f"{source} returned {part!r} for {name!r}, which is not a finite number")
    return {str(name): float(part) for name, part in parts.items()}
