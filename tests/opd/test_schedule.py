"""Hand-computed coefficients, and a controller whose state survives a checkpoint."""

import json

import pytest

from opd_trainer.opd.config import OpdConfig, ScheduleConfig, ScheduleKind
from opd_trainer.opd.schedule import KlCoefState, begin_step


def coefficients(opd: OpdConfig, steps: int, total_steps: int) -> list[float]:
    state, found = KlCoefState(opd.kl_coef), []
    for _ in range(steps):
        state = begin_step(opd, state, total_steps)
        found.append(state.kl_coef)
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(), [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        (ScheduleConfig(kind=ScheduleKind.linear, final=1.0), [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]),
        (ScheduleConfig(kind=ScheduleKind.linear, steps=2), [2.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
        # cos(pi / 4) = 0.7071068 and so on.
        (ScheduleConfig(kind=ScheduleKind.cosine), [2.0, 1.7071068, 1.0, 0.2928932, 0.0, 0.0]),
    ],
)
def test_open_loop_schedules(schedule: ScheduleConfig, expected: list[float]) -> None:
    found = coefficients(OpdConfig(kl_coef=2.0, schedule=schedule), steps=6, total_steps=4)
    assert found == pytest.approx(expected, abs=1e-7)


def test_controller_golden() -> None:
    # Target 0.1, horizon 10. Mean 0.11 over 4 tokens: error 0.1, c = 1 + 0.1 / 10 = 1.01. Mean 0.5: error bounded by
    # 0.2, c = 1.01 * 1.02. Mean 0: bounded by -0.2, c = 1.01 * 1.02 * 0.98. Nothing measured: unchanged.
    opd = OpdConfig(schedule=ScheduleConfig(kind=ScheduleKind.target_kl, target=0.1, horizon=10))
    state = begin_step(opd, KlCoefState(opd.kl_coef), 100)
    assert state.kl_coef == 1.0
    state = begin_step(opd, state.observe(0.3, 3).observe(0.14, 1), 100)
    assert state.kl_coef == pytest.approx(1.01)
    state = begin_step(opd, state.observe(0.5, 1), 100)
    assert state.kl_coef == pytest.approx(1.01 * 1.02)
    state = begin_step(opd, state.observe(0.0, 1), 100)
    assert state.kl_coef == pytest.approx(1.01 * 1.02 * 0.98)
    assert begin_step(opd, state, 100).kl_coef == state.kl_coef


def test_state_survives_json() -> None:
    state = KlCoefState(0.1 + 0.2, step=3).observe(0.7, 5)
    assert KlCoefState(**json.loads(json.dumps(state.state_dict()))) == state
