"""Whole runs that filter what they learn from."""

from pathlib import Path

import pytest

from tests.runs.runs import column, distil, kill_after, launch, steps, world

REWARD = ("reward=length", "reward.max_tokens=12", "reward.free_tokens=6")
"""Varies between short responses; truncated ones all have the same."""
REPLACE = ("rollout.filter.zero_std=replace", "rollout.filter.max_rounds=3")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


def test_groups_are_replaced_and_truncated_responses_masked(small: Path) -> None:
    output = small / "replaced"
    masked = "rollout.filter.mask_truncated=true"
    assert launch(small, output, *distil(small), *REWARD, *REPLACE, masked) == 0
    lines = steps(output)
    assert sum(line["rollout/filtered/extra_prompts"] for line in lines) > 0
    for line in lines:
        asked = 4 + line["rollout/filtered/extra_prompts"]
        assert line["rollout/filtered/zero_std_groups"] == asked - (4 - line["rollout/filtered/missing_groups"])
        assert line["rollout/skipped_steps"] or line["train/loss"] is not None
        if not line["rollout/skipped_steps"]:
            assert line["opd/masked_fraction"] == line.get("opd/masked_fraction/mask", 0.0)
    assert sum(line["rollout/filtered/truncated"] for line in lines) > 0


def test_steps_without_anything_to_learn_from_leave_the_weights_alone(small: Path) -> None:
    output = small / "skipped"
    # Random models never answer right.
    assert launch(small, output, "opd=off", "rollout.filter.zero_std=drop") == 0
    assert list(column(output, "rollout/skipped_steps")) == [1, 1, 1]
    assert not any("train/loss" in line for line in steps(output))
    frozen = small / "frozen"
    assert launch(small, frozen, "opd=off", "megatron.optimizer.lr=0") == 0
    assert list(column(output, "rollout/log_prob")) == list(column(frozen, "rollout/log_prob"))


def test_a_killed_run_goes_on_with_the_prompts_that_it_would_have_asked(small: Path, tmp_path: Path) -> None:
    options = (*distil(small), *REWARD, *REPLACE, "steps=4", "checkpoint.every=1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(small, whole, *options) == 0
    kill_after(small, killed, 2, *options)
    assert launch(small, killed, *options, "resume=auto") == 0
    assert steps(killed) == steps(whole)
