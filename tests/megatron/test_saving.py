"""A save in the background holds the state of the moment when it began."""

import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_trainer.errors import CheckpointError, OpdError
from opd_trainer.megatron.saving import Saving
from tests.megatron import training

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_model(tmp_path_factory.mktemp("student"))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before it is set."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    event, write = threading.Event(), filesystem_async._write_item

    def gated(*arguments: Any, **keywords: Any) -> Any:
        assert event.wait(timeout=600)
        return write(*arguments, **keywords)

    # Megatron looks at the arguments of the function that it calls.
    gated.__signature__ = inspect.signature(write)  # type: ignore[attr-defined]
    monkeypatch.setattr(filesystem_async, "_write_item", gated)
    yield event
    event.set()


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_training_goes_on_while_the_state_of_before_is_written(
    student: Path, gate: threading.Event, tmp_path: Path, distributed_optimizer: bool
) -> None:
    spec = training.spec(student, distributed_optimizer=distributed_optimizer)
    with training.started(spec) as worker:
        worker.update([training.batch(seed=0)], training.WeightedNll())
        saved = training.weights(worker)
        worker.save(tmp_path, True)
        assert not worker.save_done()
        after = [worker.update([training.batch(seed=seed)], training.WeightedNll()) for seed in (1, 2)]
        assert not worker.save_done()
        with pytest.raises(OpdError, match="a save is under way"):
            worker.save(tmp_path, True)
        assert not (tmp_path / "metadata.json").exists(), "complete before it is written"
        gate.set()
        worker.finish_save()
        assert worker.save_done()
        moved = training.weights(worker)
    assert any(not torch.equal(saved[name], moved[name]) for name in saved)
    with training.started(spec) as worker:
        worker.restore(tmp_path)
        found = training.weights(worker)
        assert all(torch.equal(found[name], saved[name]) for name in saved)
        again = [worker.update([training.batch(seed=seed)], training.WeightedNll()) for seed in (1, 2)]
    assert [(r.loss, r.grad_norm) for r in again] == [(r.loss, r.grad_norm) for r in after]


def test_a_failure_in_the_background_is_told_at_the_end(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full(*_arguments: Any, serialization_format: Any = None) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem_async, "_write_item", full)
    with training.started(training.spec(student)) as worker:
        worker.save(tmp_path, True)
        with pytest.raises(CheckpointError, match="No space left on device"):
            worker.finish_save()
        assert not (tmp_path / "metadata.json").exists()


def test_closing_waits_for_the_files(
    student: Path, gate: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Saving.wait

    def open_and_wait(saving: Saving) -> None:
        gate.set()
        wait(saving)

    monkeypatch.setattr(Saving, "wait", open_and_wait)
    with training.started(training.spec(student)) as worker:
        worker.save(tmp_path, True)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("save ")] == []
