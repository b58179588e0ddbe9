import pytest
import torch

from opd_trainer.collation import collate
from opd_trainer.rollout.filter import without_truncated
from opd_trainer.teacher.masked import masked_fractions
from opd_trainer.types import Finish, Prompt, Sample, ScoreStatus

NAN = float("nan")


def sample(index: int, teacher: list[float] | None, **changes: object) -> Sample:
    pieces: dict[str, object] = {
        "prompt": Prompt(id="p", tokens=torch.tensor([1, 2]), text=""),
        "index": index,
        "response": torch.tensor([3, 4]),
        "log_probs": torch.zeros(2),
        "finish": Finish.stop,
        "version": 0,
        "text": "",
        "reward": 0.0,
        "teacher_log_probs": None if teacher is None else torch.tensor(teacher),
        "teacher_temperature": 1.0,
    }
    return Sample(**(pieces | changes))  # pyright: ignore[reportArgumentType]


def test_parts_add_up_to_the_whole() -> None:
    samples = [
        sample(0, [-1.0, -1.0]),
        sample(1, [NAN, NAN], teacher_status=ScoreStatus.timeout),
        sample(2, [-1.0, NAN], teacher_status=ScoreStatus.nonfinite),
        # Not learned from: whatever became of its scoring has no part in it.
        sample(3, [NAN, NAN], teacher_status=ScoreStatus.timeout, finish=Finish.length),
        # It has the engine's own log-probs (teacher.on_failure=fallback_rollout).
        sample(4, [-1.0, -1.0], teacher_status=ScoreStatus.http_error),
    ]
    values = masked_fractions(samples, without_truncated(collate(samples, 1.0))).values()
    assert values == pytest.approx(
        {
            "opd/masked_fraction": 0.5,
            "opd/masked_fraction/mask": 0.2,
            "opd/masked_fraction/nonfinite": 0.1,
            "opd/masked_fraction/timeout": 0.2,
        }
    )


def test_a_teacher_inside_the_update_scores_every_token() -> None:
    samples = [sample(0, None), sample(1, None)]
    assert masked_fractions(samples, collate(samples, 1.0)).values() == {"opd/masked_fraction": 0.0}
