"""The same run on Ray: two data-parallel Megatron workers on gloo and one rollout worker."""

from pathlib import Path

import pytest

from tests.runs.runs import column, distil, start, world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.mark.ray
def test_ray_with_two_training_workers_gives_the_numbers_of_one_process(small: Path) -> None:
    outputs = {name: small / name for name in ("inprocess", "ray")}
    for name, output in outputs.items():
        process = start(small, output, *distil(small), f"cluster={name}", "steps=2")
        printed, _ = process.communicate(timeout=900)
        assert process.returncode == 0, printed
    for metric in ("train/loss", "train/grad_norm", "opd/reverse_kl"):
        ours, theirs = (list(column(output, metric)) for output in outputs.values())
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)
