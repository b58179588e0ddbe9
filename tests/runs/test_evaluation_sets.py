"""Which held-out prompts a run is evaluated on."""

import json
from pathlib import Path

import pytest

from tests.runs.runs import launch, summary, world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


def test_prompts_that_are_trained_on_are_refused_unless_asked_for(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = ("opd=off", "steps=1", f"eval.datasets.seen.path={small / 'data' / 'train.jsonl'}")
    assert launch(small, small / "refused", *trained) == 2
    message = capsys.readouterr().err
    assert message.startswith("eval.datasets.seen: 64 of 64 prompts are also trained on")
    assert "eval.allow_trained_on=true" in message
    assert message.count("\n") == 1
    output = small / "accepted"
    assert launch(small, output, *trained, "eval.allow_trained_on=true", "eval.n_prompts=3") == 0
    records = [json.loads(line) for line in (output / "eval_0000001.jsonl").read_text().splitlines()]
    assert [record["dataset"] for record in records] == ["heldout"] * 3 + ["seen"] * 3
    assert set(summary(output)["evaluation"]["after"]) == {"heldout", "seen"}


def test_two_steps_are_evaluated_on_few_prompts(small: Path) -> None:
    output = small / "two_steps"
    assert launch(small, output, "opd=off", "debug=two_steps") == 0
    assert len((output / "eval_0000003.jsonl").read_text().splitlines()) == 4
