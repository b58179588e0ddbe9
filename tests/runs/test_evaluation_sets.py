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
    assert summary(output)["delta"]["seen"] == {"value": 0.0, "standard_error": 0.0}


def test_every_figure_of_an_evaluation_is_in_its_file(small: Path) -> None:
    output = small / "figures"
    several = ("eval.samples_per_prompt=2", "eval.temperature=1", "eval.top_k=5", "eval.top_p=0.9")
    short = "eval.max_response_tokens=2"
    assert launch(small, output, "task=evaluate", "eval.n_prompts=3", *several, short) == 0
    figures = json.loads((output / "eval_0000000.json").read_text())
    names = {"pass@1", "pass@1_se", "pass@2", "pass@2_se", "mean@2", "mean@2_se", "truncated_ratio"}
    assert {f"eval/heldout/{name}" for name in names} <= set(figures)
    records = [json.loads(line) for line in (output / "eval_0000000.jsonl").read_text().splitlines()]
    assert max(record["num_tokens"] for record in records) == 2


def test_two_steps_are_evaluated_on_few_prompts(small: Path) -> None:
    output = small / "two_steps"
    assert launch(small, output, "opd=off", "debug=two_steps") == 0
    assert len((output / "eval_0000003.jsonl").read_text().splitlines()) == 4
