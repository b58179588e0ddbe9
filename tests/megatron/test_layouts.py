import pickle
from pathlib import Path

import pytest
import torch

from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.teacher.config import ResidentTeacher
from opd_trainer.teacher.inline import inline_teacher
from tests.gloo import run_gloo
from tests.megatron import training
from tests.megatron.training import Distill, weights

PARTS = ([0, 3], [1], [], [2, 5, 4])
LAYOUTS = ({"tensor_parallel": 2}, {"pipeline_parallel": 2})


def distill(rank: int, world_size: int, rendezvous: str, folders: tuple[Path, Path, Path], layouts) -> bytes:
    """Two updates with an inline teacher in each layout, around a save and restore."""
    student, teacher, folder = folders
    batch = training.batch()
    outcomes = []
    for number, layout in enumerate(layouts):
        plain = training.spec(student, lr=1e-4, **layout)
        resident = inline_teacher("default", ResidentTeacher(load=str(teacher)), plain.model, plain.megatron, 1.0)
        spec = training.spec(student, lr=1e-4, teachers={"default": resident}, **layout)
        worker = MegatronWorker(spec, rank, world_size, f"{rendezvous}{number}")
        worker.start()
        try:
            first = worker.update([batch.take(part) for part in PARTS], Distill())
            saved = folder / str(number)
            saved.mkdir(parents=True, exist_ok=True)
            worker.save(saved)
            second = worker.update([batch], Distill())
            worker.restore(saved)
            assert worker.update([batch], Distill()).grad_norm == second.grad_norm
            outcomes.append((worker.place(), first, second, worker.score([batch], "teacher")[0], weights(worker)))
        finally:
            worker.close()
    return pickle.dumps(outcomes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    student = training.write_model(folder / "student")
    teacher = training.write_model(folder / "teacher", seed=1)
    rendezvous = (folder / "rendezvous").as_uri()
    (alone,) = pickle.loads(distill(0, 1, rendezvous, (student, teacher, folder / "alone"), [{}]))
    both = [pickle.loads(result) for result in run_gloo(distill, 2, (student, teacher, folder / "both"), LAYOUTS)]
    return alone, list(zip(*both, strict=True))


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_tensor_and_pipeline_parallel_ranks_equal_one(runs, number):
    (_, first, second, scored, exported), ranks = runs[0], runs[1][number]
    assert sorted(place.reports for place, *_ in ranks) == [False, True]
    assert all(place.dp_size == 1 for place, *_ in ranks)
    (reported,) = (rank for rank in ranks if rank[0].reports)
    for ours, theirs in ((first, reported[1]), (second, reported[2])):
        assert theirs.loss == pytest.approx(ours.loss, abs=1e-6)
        assert theirs.grad_norm == pytest.approx(ours.grad_norm, rel=1e-5)
        for name in ("log_probs", "entropy", "teacher"):
            for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(scored, reported[3], atol=1e-5, rtol=1e-5, equal_nan=True)
    for name, tensor in ranks[0][4].items():
        torch.testing.assert_close(tensor, exported[name], atol=1e-5, rtol=1e-5)
