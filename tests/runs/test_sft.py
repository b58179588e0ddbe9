"""Supervised fine-tuning through `launch.py`."""

import json
from pathlib import Path

import pytest

from tests.runs.runs import column, launch, summary, world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's rows, with the response in a column of another name."""
    found = world(tmp_path_factory.mktemp("world"))
    data = found / "data" / "train.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row | {"worked": row.pop("response")}) + "\n" for row in rows))
    return found


SFT = ("task=sft", "task.response_key=worked", "task.batch_size=16", "eval.every=2", "eval.n_prompts=2")


def test_it_learns_the_responses_and_writes_the_model(small: Path) -> None:
    output = small / "plain"
    assert launch(small, output, *SFT, "steps=5") == 0
    losses = list(column(output, "train/loss"))
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.1
    assert sorted(path.name for path in output.glob("eval_*.jsonl")) == [
        "eval_0000002.jsonl",
        "eval_0000004.jsonl",
        "eval_0000005.jsonl",
    ]
    assert (output / "model" / "config.json").is_file()
    assert not (output / "snapshot").exists()


def test_it_stops_and_takes_a_snapshot_at_an_accuracy(small: Path) -> None:
    """Of 0, which every model has: at the first evaluation."""
    output = small / "stopped"
    assert launch(small, output, *SFT, "steps=50", "task.stop_accuracy=0", "task.snapshot_accuracy=0") == 0
    assert summary(output)["steps"] == 2
    assert (output / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    weights = [(output / name / "model.safetensors").read_bytes() for name in ("model", "snapshot")]
    assert weights[0] == weights[1]


def test_an_accuracy_out_of_reach_changes_nothing(small: Path) -> None:
    output = small / "out_of_reach"
    assert launch(small, output, *SFT, "steps=3", "task.stop_accuracy=1", "task.snapshot_accuracy=1") == 0
    assert summary(output)["steps"] == 3
    assert not (output / "snapshot").exists()


def test_a_column_that_is_not_there_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(small, small / "refused", *SFT, "task.response_key=response") == 2
    assert "no text in column 'response'" in capsys.readouterr().err


@pytest.mark.parametrize("task", [SFT, ("task=evaluate", "eval.n_prompts=2")], ids=["sft", "evaluate"])
def test_nobody_is_loaded_who_is_not_asked(small: Path, task: tuple[str, ...]) -> None:
    """A teacher and a reference of a configuration that also trains are of no use here, and need not be there."""
    absent = ("opd=megatron", f"teacher.load={small / 'nowhere'}", f"reference.load={small / 'nowhere'}")
    assert launch(small, small / task[0].replace("=", "_"), *task, *absent, "reference.kl_coef=0.1", "steps=1") == 0
