import json
import math
from pathlib import Path

import torch

from opd_trainer.tracking.files import METRICS, SAMPLES, SUMMARY, RunFiles, read_rows
from opd_trainer.tracking.sink import StepRecord
from opd_trainer.tracking.summary import Results
from opd_trainer.types import Finish, Prompt, Sample


def sample(index: int) -> Sample:
    prompt = Prompt(id="p7", tokens=torch.tensor([1, 2]), text="3+4=", answer="7", dataset="heldout")
    return Sample(
        prompt=prompt,
        index=index,
        response=torch.tensor([5, 6, 7]),
        log_probs=torch.zeros(3),
        finish=Finish.stop,
        version=2,
        text="#### 7 ✓",
        reward=1.0,
        reward_parts={"exact": 1.0},
    )


def record(step: int, samples: int = 0, **values: float) -> StepRecord:
    return StepRecord(step=step, values=values, samples=tuple(sample(i) for i in range(samples)), results=Results())


def test_a_row_per_step_with_floats_to_the_last_bit(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, samples_per_step=0)
    awkward = [0.1 + 0.2, 1e-310, math.pi * 1e20, float(torch.tensor(1 / 3))]
    for step, value in enumerate(awkward):
        files.write(record(step, x=value))
    files.truncate_after(2)
    assert read_rows(tmp_path / METRICS) == [{"step": step, "x": value} for step, value in enumerate(awkward[:3])]
    assert not (tmp_path / SAMPLES).exists()


def test_unknown_is_null_because_json_has_no_nan(tmp_path: Path) -> None:
    RunFiles(tmp_path, 0).write(record(0, unknown=math.nan, huge=math.inf, zero=0.0))
    line = (tmp_path / METRICS).read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 0,
        "unknown": None,
        "huge": None,
        "zero": 0.0,
    }


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_only_so_many_samples_with_everything_a_reader_needs(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, samples_per_step=2)
    files.write(record(4, samples=5))
    rows = read_rows(tmp_path / SAMPLES)
    assert [row["index"] for row in rows] == [0, 1]
    assert rows[0] == {
        "step": 4,
        "prompt_id": "p7",
        "index": 0,
        "dataset": "heldout",
        "prompt": "3+4=",
        "response": "#### 7 ✓",
        "answer": "7",
        "reward": 1.0,
        "reward_parts": {"exact": 1.0},
        "response_tokens": 3,
        "finish": "stop",
        "version": 2,
    }


def test_truncation_forgets_later_steps_a_torn_line_and_the_old_end(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, samples_per_step=1)
    for step in range(4):
        files.write(record(step, samples=1, x=float(step)))
    (tmp_path / SUMMARY).write_text("{}")
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "x"')  # killed in the middle of a write

    assert [row["step"] for row in read_rows(tmp_path / METRICS)] == [0, 1, 2, 3]
    files.truncate_after(1)
    files.write(record(2, samples=1, x=-2.0))
    assert [(row["step"], row["x"]) for row in read_rows(tmp_path / METRICS)] == [(0, 0.0), (1, 1.0), (2, -2.0)]
    assert [row["step"] for row in read_rows(tmp_path / SAMPLES)] == [0, 1, 2]
    assert not (tmp_path / SUMMARY).exists()


def test_truncation_to_nothing(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, 0)
    files.truncate_after(-1)
    files.write(record(0))
    files.truncate_after(-1)
    assert read_rows(tmp_path / METRICS) == []
