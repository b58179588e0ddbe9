"""Whatever a teacher does in the student's worker, the student stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import OpdError
from opd_trainer.megatron.live_weights import STUDENT
from opd_trainer.megatron.micro_batch import prepare
from opd_trainer.model.config import Dtype, ModelConfig
from opd_trainer.teacher.inline import MegatronTeacher
from opd_trainer.types import TokenBatch
from opd_trainer.updates import Wants
from tests.megatron.training import Distill, started
from tests.teacher.placements import INLINE, batch_of, config, everything, parts, spec_with, worker_with

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
]


LAYOUTS = ({}, {"dtype": Dtype.bfloat16}, {"distributed_optimizer": True})


@pytest.mark.parametrize("options", LAYOUTS, ids=["float32", "bfloat16", "distributed optimizer"])
@pytest.mark.parametrize("placement", INLINE)
def test_scoring_leaves_the_student_bit_for_bit_as_it_was(
    placement: str, options: dict[str, Any], folders: Any
) -> None:
    options = dict(options)
    model = ModelConfig(load=str(folders["student"]), dtype=options.pop("dtype", Dtype.float32))
    spec = spec_with(folders["student"], teacher=config(placement, folders["teacher"]), model=model, **options)
    batch = batch_of()
    with started(spec) as worker:
        worker.update(parts(batch), Distill())
        before = everything(worker)
        pointers = [p.data_ptr() for p in worker._student.model.modules[0].parameters()]  # type: ignore[union-attr]
        scored = [worker.score(parts(batch), "teacher") for _ in range(2)]
        after = everything(worker)
        moved = [p.data_ptr() for p in worker._student.model.modules[0].parameters()]  # type: ignore[union-attr]
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*scored, strict=True))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert moved == pointers


def test_updates_are_the_same_in_every_placement(folders: Any) -> None:
    batch = batch_of()
    outcomes = {}
    for placement in INLINE:
        with started(spec_with(folders["student"], teacher=config(placement, folders["teacher"]))) as worker:
            results = [worker.update(parts(batch), Distill()) for _ in range(3)]
            outcomes[placement] = ([(r.loss, r.grad_norm) for r in results], everything(worker))
    for placement in ("offload", "swap"):
        assert outcomes[placement][0] == outcomes["resident"][0]
        for name, tensor in outcomes["resident"][1].items():
            assert torch.equal(tensor, outcomes[placement][1][name]), f"{placement}: {name}"


def test_an_offloaded_teacher_holds_no_device_memory_between_uses(folders: Any) -> None:
    def held(teacher: MegatronTeacher) -> int:
        return sum(p.untyped_storage().nbytes() for m in teacher.frozen.model.modules for p in m.parameters())

    with worker_with("offload", folders) as (worker, teacher):
        whole = sum(t.nbytes for t in teacher.frozen.weights.host.tensors.values())  # type: ignore[attr-defined]
        assert held(teacher) == 0
        with teacher.ready():
            assert held(teacher) == whole > 0
            with pytest.raises(OpdError, match="on the device already"), teacher.ready():
                pass
        worker.score([batch_of()], "teacher")
        assert held(teacher) == 0


@pytest.mark.parametrize("placement", ["offload", "swap"])
def test_scoring_needs_the_weights(placement: str, folders: Any) -> None:
    with worker_with(placement, folders) as (_, teacher), pytest.raises(OpdError):
        teacher.score_inline(batch_of(), Wants())


def break_off(teacher: MegatronTeacher, batch: TokenBatch, kind: type[BaseException]) -> None:
    with teacher.ready():
        teacher.frozen.score(prepare(batch, teacher.frozen.model.runtime))
        raise kind


class Interrupted(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


@pytest.mark.parametrize("kind", [ValueError, Interrupted])
@pytest.mark.parametrize("placement", INLINE)
def test_an_exception_while_the_teacher_scores_restores_the_student(placement: str, kind: Any, folders: Any) -> None:
    batch = batch_of()
    with worker_with(placement, folders) as (worker, teacher):
        expected = worker.score([batch], "teacher")[0]
        before = everything(worker)
        with pytest.raises(kind):
            break_off(teacher, batch, kind)
        after = everything(worker)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(worker.score([batch], "teacher")[0].nan_to_num(7), expected.nan_to_num(7))
        worker.update([batch], Distill())


@pytest.mark.parametrize("at", [0, 1, 2, 7, 12])
def test_an_exception_in_the_middle_of_the_exchange_restores_the_student(
    at: int, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opd_trainer.megatron import live_weights

    plain, calls = live_weights._copy, iter(range(10**6))

    def breaking(target: Tensor, source: Tensor) -> None:
        if next(calls) == at:
            raise Interrupted
        plain(target, source)

    with worker_with("swap", folders) as (worker, teacher):
        before = everything(worker)
        monkeypatch.setattr(live_weights, "_copy", breaking)
        with pytest.raises(Interrupted), teacher.ready():
            raise AssertionError("the weights were never exchanged")
        monkeypatch.undo()
        after = everything(worker)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert worker._live is not None
        assert worker._live.owner == STUDENT


def test_nothing_happens_to_the_student_while_its_module_is_lent(folders: Any, tmp_path: Path) -> None:
    batch = batch_of()
    with worker_with("swap", folders) as (worker, teacher):
        worker.start_export(1 << 30, "student")
        forbidden: dict[str, Callable[[], Any]] = {
            "an update": lambda: worker.update([batch], Distill()),
            "scoring": lambda: worker.score([batch], "student"),
            "saving": lambda: worker.save(tmp_path),
            "restoring": lambda: worker.restore(tmp_path),
            "handing out": worker.next_bucket,
            "exporting": lambda: worker.export(tmp_path / "exported"),
            "lending": lambda: teacher.ready().__enter__(),
        }
        with teacher.ready():
            for purpose, act in forbidden.items():
                with pytest.raises(OpdError, match=f"{purpose}.*student.*teacher:default"):
                    act()
        assert worker.next_bucket()
        assert list(tmp_path.iterdir()) == []
