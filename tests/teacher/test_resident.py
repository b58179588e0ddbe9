import copy
import pickle

import pytest
import torch

from opd_trainer.errors import CheckpointError, ShapeMismatch
from opd_trainer.megatron.optimizer import has_gradient_buffers
from opd_trainer.model.config import ModelConfig
from opd_trainer.protocols import InlineTeacher
from opd_trainer.teacher.config import ResidentTeacher as ResidentTeacherConfig
from opd_trainer.teacher.inline import MegatronTeacher, inline_teacher
from opd_trainer.types import Scores, Signal
from tests.megatron import training
from tests.megatron.training import Distill, WeightedNll, started


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Student, a teacher of its shape, and a bigger teacher."""
    return {
        "student": training.write_model(tmp_path_factory.mktemp("student"), seed=0),
        "teacher": training.write_model(tmp_path_factory.mktemp("teacher"), seed=1),
        "big": training.write_model(tmp_path_factory.mktemp("big"), seed=2, hidden_size=48, num_layers=3),
    }


def builder(folders, which="teacher", name="default", *, own_model=False, temperature=1.0):
    spec = training.spec(folders["student"])
    teacher = ResidentTeacherConfig(load=str(folders[which]), model=ModelConfig() if own_model else None)
    return inline_teacher(name, teacher, spec.model, spec.megatron, temperature)


def spec(folders, **teachers):
    return training.spec(folders["student"], teachers=teachers)


def test_a_teacher_that_is_the_student_has_the_same_log_probs_bit_for_bit(folders):
    batch = training.batch()
    with started(spec(folders, default=builder(folders, "student"))) as worker:
        result = worker.update([batch.take([0, 1, 2]), batch.take([3, 4, 5])], Distill())
    assert result.teacher is not None
    for live, teacher in zip(result.log_probs, result.teacher, strict=True):
        assert torch.equal(live.nan_to_num(7), teacher.nan_to_num(7))
    assert (result.loss, result.grad_norm) == (0.0, 0.0)


def test_the_inline_teacher_scores_what_it_scores_alone(folders):
    batch = training.batch()
    with started(training.spec(folders["teacher"])) as worker:
        expected = worker.score([batch], "student")[0]
    with started(spec(folders, default=builder(folders))) as worker:
        result = worker.update([batch], Distill())
        alone = worker.score([batch], "teacher")[0]
        by_name = worker.score([batch], "teacher:default")[0]
    assert result.teacher is not None
    for scored in (result.teacher[0], alone, by_name):
        assert torch.equal(scored.nan_to_num(7), expected.nan_to_num(7))
    assert not torch.equal(result.log_probs[0][batch.mask], expected[batch.mask])
    assert result.seconds["teacher"] > 0


def test_distillation_approaches_the_teacher(folders):
    batch = training.batch()
    weight = batch.mask / batch.mask.sum()
    with started(spec(folders, default=builder(folders, "big", own_model=True))) as worker:
        gaps = []
        for _ in range(30):
            result = worker.update([batch.replace(weight=weight)], Distill())
            assert result.teacher is not None
            gaps.append(float((result.log_probs[0] - result.teacher[0])[batch.mask].square().mean()))
    assert gaps[-1] < 0.1 * gaps[0]


def test_a_resident_teacher_has_no_gradients_and_leaves_the_students_settings(folders):
    recipe = builder(folders, "big", own_model=True)
    told = spec(folders, default=recipe)
    before = copy.deepcopy(told)
    with started(told) as worker:
        worker.update([training.batch()], Distill())
        teacher = worker._teachers["default"]
        assert isinstance(teacher, MegatronTeacher)
        parameters = [p for module in teacher.frozen.model.modules for p in module.parameters()]
        assert not any(p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in parameters)
        assert not any(has_gradient_buffers(module) for module in teacher.frozen.model.modules)
        assert worker._student is not None
        assert has_gradient_buffers(worker._student.model.modules[0])
        assert teacher.frozen.model.architecture.hidden_size == 48
        assert worker._student.model.architecture.hidden_size == 32
        assert teacher.signals == set(Signal)
        conforms: InlineTeacher = teacher
        assert conforms.identity == recipe.identity
    assert told == before
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_teachers_by_name_and_scores_that_are_there_already(folders):
    batch = training.batch()
    names = ("default", "math", "server", "math", "default", "math")
    carried = torch.where(batch.mask & (batch.seq == 2), -1.5, torch.nan)
    batch = batch.replace(teacher_name=names, teacher=Scores(log_probs=carried, temperature=1.0, model="teacher"))
    recipes = {"default": builder(folders), "math": builder(folders, "big", "math", own_model=True)}
    with started(spec(folders, **recipes)) as worker:
        result = worker.update([batch], Distill())
        default = worker.score([batch], "teacher:default")[0]
        math = worker.score([batch], "teacher:math")[0]
    assert result.teacher is not None
    sequences = {name: [i for i, other in enumerate(names) if other == name] for name in set(names)}
    for name, scored in (("default", default), ("math", math), ("server", carried)):
        chosen = batch.mask & torch.isin(batch.seq, torch.tensor(sequences[name]))
        assert bool(chosen.any())
        torch.testing.assert_close(result.teacher[0][chosen], scored[chosen], atol=1e-6, rtol=1e-6)


def test_masked_and_empty_micro_batches_need_no_teacher(folders):
    batch = training.batch((3, 2), (0, 0))
    with started(spec(folders, default=builder(folders))) as worker:
        result = worker.update([batch, training.batch((), ())], WeightedNll())
    assert result.teacher is not None
    assert [len(values) for values in result.teacher] == [5, 0]
    assert bool(result.teacher[0].isnan().all())


def test_what_does_not_fit_is_refused_before_anything_is_loaded(folders, tmp_path):
    with pytest.raises(ShapeMismatch, match=r"hidden_size +32 +48"):
        builder(folders, "big")
    with pytest.raises(CheckpointError, match="no such folder"):
        builder({**folders, "teacher": tmp_path / "missing"})


def test_a_checkpoint_of_ours_is_a_teacher(folders, tmp_path):
    saved = tmp_path / "iter_0000001"
    saved.mkdir()
    with started(training.spec(folders["teacher"])) as worker:
        worker.save(saved)
    batch = training.batch()
    recipe = builder({**folders, "teacher": tmp_path})
    with started(spec(folders, default=recipe)) as worker:
        ours = worker.score([batch], "teacher")[0]
    with started(spec(folders, default=builder(folders))) as worker:
        assert torch.equal(worker.score([batch], "teacher")[0].nan_to_num(7), ours.nan_to_num(7))
