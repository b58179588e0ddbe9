"""The coefficient of the OPD term over the run, as an explicit state that checkpoints carry."""

import math
from dataclasses import dataclass, replace
from typing import Any

from opd_trainer.opd.config import OpdConfig, ScheduleKind

LARGEST_ERROR = 0.2


@dataclass(frozen=True, slots=True)
class KlCoefState:
    """Where the schedule stands.

    Attributes:
        kl_coef: coefficient of the current step.
        step: steps begun so far.
        kl_sum: sum of the reverse KL over the tokens of the current step.
        kl_tokens: how many tokens that was.
    """

    kl_coef: float
    step: int = 0
    kl_sum: float = 0.0
    kl_tokens: int = 0

    def observe(self, kl_sum: float, kl_tokens: int) -> "KlCoefState":
        """Adds what one update measured."""
        return replace(self, kl_sum=self.kl_sum + kl_sum, kl_tokens=self.kl_tokens + kl_tokens)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"kl_coef": self.kl_coef, "step": self.step, "kl_sum": self.kl_sum, "kl_tokens": self.kl_tokens}


def begin_step(opd: OpdConfig, state: KlCoefState, total_steps: int) -> KlCoefState:
    """The state of the next step, from what was measured in the last one.

    constant: c. linear, cosine: from c to `final` over `steps`. target_kl: the proportional controller of Ziegler et
    al., arXiv 1909.08593, section 2.2: c <- c (1 + clip(kl / target - 1, -0.2, 0.2) / horizon).

    Args:
        opd: `opd.kl_coef` and `opd.schedule`.
        state: of the step that ended; of a run that begins, `KlCoefState(opd.kl_coef)`.
        total_steps: the run's length, the default of `opd.schedule.steps`.
    """
    schedule = opd.schedule
    progress = min(state.step / max(schedule.steps or total_steps, 1), 1.0)
    match schedule.kind:
        case ScheduleKind.constant:
            coef = opd.kl_coef
        case ScheduleKind.linear:
            coef = opd.kl_coef + (schedule.final - opd.kl_coef) * progress
        case ScheduleKind.cosine:
            coef = schedule.final + (opd.kl_coef - schedule.final) * (1 + math.cos(math.pi * progress)) / 2
        case ScheduleKind.target_kl:
            coef = _controlled(state, schedule.target, schedule.horizon)
    return KlCoefState(coef, state.step + 1)


def _controlled(state: KlCoefState, target: float, horizon: int) -> float:
    if not state.kl_tokens:
        return state.kl_coef
    error = state.kl_sum / state.kl_tokens / target - 1
    return state.kl_coef * (1 + max(-LARGEST_ERROR, min(error, LARGEST_ERROR)) / horizon)
