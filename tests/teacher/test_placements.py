"""One suite for every place in which a Megatron teacher can live."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_trainer.divergence.config import DivergenceConfig, DivergenceKind
from opd_trainer.divergence.token import TokenDivergence
from opd_trainer.errors import CheckpointError, ShapeMismatch, TeacherError
from opd_trainer.megatron.config import Placement
from opd_trainer.megatron.micro_batch import Scoring
from opd_trainer.megatron.optimizer import has_gradient_buffers
from opd_trainer.megatron.scoring_worker import ScoringSpec
from opd_trainer.megatron.spec import WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ModelConfig
from opd_trainer.protocols import InlineTeacher
from opd_trainer.teacher import config as placements
from opd_trainer.teacher.dedicated import DedicatedTeacher
from opd_trainer.teacher.inline import checked_teacher, inline_teacher
from opd_trainer.types import Signal
from opd_trainer.updates import Wants
from tests.gloo import run_gloo
from tests.megatron import training
from tests.megatron.training import Distill, started
from tests.teacher.placements import (
    ALL,
    INLINE,
    NOISE,
    TEMPERATURE,
    batch_of,
    close,
    config,
    everything,
    run,
    scores,
    spec_with,
    with_dedicated,
    worker_with,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def padded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with more rows in its output head than the tokenizer has words, as large models are published."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("padded")
    model: Any = AutoModelForCausalLM.from_pretrained(folders["teacher"])
    model.resize_token_embeddings(model.config.vocab_size + 42)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folders["teacher"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("placement", ALL)
def test_every_placement_gives_the_same_scores(placement: str, folders: Any, expected: Any) -> None:
    assert float((expected["teacher"] - expected["student"]).abs().mean()) > 100 * NOISE
    close(placement, scores(placement, folders["student"], folders["teacher"]), expected["teacher"])


DEDICATED_LAYOUTS = ({"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2}, {})


def dedicated_rank(rank: int, world_size: int, rendezvous: str, student: Path, teacher: Path) -> bytes:
    """Log-probs of the response tokens by a teacher with two workers, in each layout."""
    found = []
    for number, layout in enumerate(DEDICATED_LAYOUTS):
        checked = checked_teacher(
            "default", placements.DedicatedTeacher(load=str(teacher)), ModelConfig(load=str(student))
        )
        megatron = training.spec(student, **layout).megatron
        scoring = Scoring(TEMPERATURE, megatron.log_prob_chunk_tokens)
        spec = ScoringSpec(model=checked.settings, megatron=megatron, scoring=scoring, seed=0)
        worker = spec.make_worker(rank, world_size, f"{rendezvous}{number}")
        worker.start()
        try:
            (scored,) = worker.score([batch_of()])
            found.append((worker.place().reports, scored[batch_of().mask]))
        finally:
            worker.close()
    return pickle.dumps(found)


def test_a_dedicated_teacher_may_have_a_layout_of_its_own(folders: Any, expected: Any) -> None:
    ranks = [pickle.loads(result) for result in run_gloo(dedicated_rank, 2, folders["student"], folders["teacher"])]
    for layout, *both in zip(DEDICATED_LAYOUTS, *ranks, strict=True):
        reported = [scored for reports, scored in both if reports]
        assert len(reported) == (1 if layout else 2)
        for scored in reported:
            close(f"dedicated, {layout or 'data parallel'}", scored, expected["teacher"])


@pytest.mark.parametrize("placement", [name for name in ALL if name != "swap"])
def test_a_teacher_may_have_an_architecture_of_its_own(placement: str, folders: Any, expected: Any) -> None:
    close(placement, scores(placement, folders["student"], folders["other"], own_model=True), expected["other"])


@pytest.mark.parametrize("placement", [name for name in ALL if name != "swap"])
def test_padded_vocabularies_may_differ(placement: str, folders: Any, padded: Path) -> None:
    with started(training.spec(padded, temperature=TEMPERATURE)) as worker:
        alone = worker.score([batch_of()], "student")[0][batch_of().mask]
    close(placement, scores(placement, folders["student"], padded, own_model=True), alone)


@pytest.mark.parametrize("which", ["other", "turned"])
def test_swap_refuses_a_model_that_the_students_module_cannot_compute(which: str, folders: Any) -> None:
    with pytest.raises(ShapeMismatch, match="teacher=" if which == "turned" else "model") as refused:
        spec_with(folders["student"], teacher=config("swap", folders[which]))
    assert ("rope_theta" if which == "turned" else "hidden_size") in str(refused.value)


@pytest.mark.parametrize("placement", INLINE)
def test_a_teacher_has_no_gradient_and_conforms(placement: str, folders: Any) -> None:
    with worker_with(placement, folders) as (worker, teacher):
        conforms: InlineTeacher = teacher
        stays = placement == "resident"
        assert conforms.signals == ({*Signal} if stays else {Signal.sampled, Signal.topk})
        worker.update([batch_of()], Distill())
        if placement == "swap":
            assert worker._student is not None
            assert teacher.frozen.model is worker._student.model
            tensors = list(teacher.frozen.host.tensors.values())  # type: ignore[attr-defined]
            assert not any(t.requires_grad or t.grad is not None for t in tensors)
        else:
            assert not any(has_gradient_buffers(module) for module in teacher.frozen.model.modules)
        if not stays:
            wants = Wants(divergence=TokenDivergence(DivergenceConfig(kind=DivergenceKind.reverse_kl)))
            with pytest.raises(TeacherError, match="gives sampled, topk, not full_vocab"):
                teacher.score_inline(batch_of(), wants)


@pytest.mark.parametrize("placement", ALL)
def test_a_teachers_weights_can_be_handed_out(placement: str, folders: Any) -> None:
    from safetensors.torch import load_file

    wanted = load_file(folders["teacher"] / "model.safetensors")

    async def collect(dedicated: DedicatedTeacher) -> dict[str, Tensor]:
        return {name: t.clone() async for bucket in dedicated.weights().buckets for name, t in bucket}

    if placement in INLINE:
        with worker_with(placement, folders) as (worker, _):
            worker.start_export(1000, "teacher:default")
            found = {name: t.clone() for bucket in iter(worker.next_bucket, None) for name, t in bucket}
    else:
        teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))
        found = run(with_dedicated(folders["student"], teacher, collect))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_several_teachers_each_in_a_place_of_its_own(folders: Any, expected: Any) -> None:
    batch = batch_of()
    names = ("default", "maths", "code", "maths", "default", "code")
    batch = batch.replace(teacher_name=names)
    plain = training.spec(folders["student"], temperature=TEMPERATURE)
    chosen = {
        "default": config("swap", folders["teacher"]),
        "maths": config("offload", folders["other"], own_model=True),
        "code": config("swap", folders["student"]),
    }
    built = {k: inline_teacher(k, v, plain.model, plain.megatron, TEMPERATURE) for k, v in chosen.items()}
    with started(dataclasses.replace(plain, teachers=built)) as worker:
        result = worker.update([batch], Distill())
    assert result.teacher is not None
    scored, sequences = result.teacher[0][batch.mask], batch.seq[batch.mask]
    for name, model in (("default", "teacher"), ("maths", "other"), ("code", "student")):
        mine = torch.isin(sequences, torch.tensor([i for i, other in enumerate(names) if other == name]))
        torch.testing.assert_close(scored[mine], expected[model][mine], atol=NOISE, rtol=0)


@pytest.mark.parametrize("placement", Placement)
def test_the_reference_lives_in_the_same_places(placement: Placement, folders: Any, expected: Any) -> None:
    spec = training.spec(folders["student"], temperature=TEMPERATURE)
    reference = ModelConfig(load=str(folders["teacher"]))
    batch = batch_of()
    with started(dataclasses.replace(spec, reference=reference, reference_placement=placement)) as worker:
        before = everything(worker)
        scored = worker.score([batch], "reference")[0][batch.mask]
        after = everything(worker)
    close(f"reference, {placement}", scored, expected["teacher"])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("placement", ALL)
def test_a_step_of_a_folder_of_checkpoints(placement: str, folders: Any, expected: Any, tmp_path: Path) -> None:
    """A folder of checkpoints with and without `ckpt_step`, and one checkpoint by its own path."""
    for step, model in ((100, "teacher"), (200, "student")):
        saved = tmp_path / f"iter_{step:07d}"
        saved.mkdir()
        with started(training.spec(folders[model])) as worker:
            worker.save(saved)
    student = folders["student"]
    close(f"{placement}, ckpt_step", scores(placement, student, tmp_path, step=100), expected["teacher"])
    close(f"{placement}, folder", scores(placement, student, tmp_path), expected["student"])
    close(f"{placement}, iter_", scores(placement, student, tmp_path / "iter_0000100"), expected["teacher"])
    with pytest.raises(CheckpointError, match="no checkpoint of step 300: it has 100, 200"):
        scores(placement, student, tmp_path, step=300)
    with pytest.raises(CheckpointError, match="step 100, but ckpt_step is 200"):
        scores(placement, student, tmp_path / "iter_0000100", step=200)


def with_layout(folders: dict[str, Path], placement: str, **layout: Any) -> WorkerSpec:
    return spec_with(folders["student"], teacher=config(placement, folders["teacher"]), **layout)


TWO = ({"tensor_parallel": 2}, {"pipeline_parallel": 2}, {})


def both(rank: int, world_size: int, rendezvous: str, folders: dict[str, Path]) -> bytes:
    """Scores by placement and layout, pickled; the student is looked after on the way."""
    batch, found = batch_of(), []
    for number, layout in enumerate(TWO):
        for placement in INLINE:
            spec = with_layout(folders, placement, **layout)
            worker = MegatronWorker(spec, rank, world_size, f"{rendezvous}{number}{placement}")
            worker.start()
            try:
                before = everything(worker)
                scored = worker.score([batch], "teacher")[0][batch.mask]
                after = everything(worker)
                assert all(torch.equal(before[name], after[name]) for name in before)
                if worker.place().reports:
                    found.append((placement, layout, scored))
            finally:
                worker.close()
    return pickle.dumps(found)


def test_every_placement_works_in_every_layout(folders: Any, expected: Any) -> None:
    reported = [entry for found in run_gloo(both, 2, folders) for entry in pickle.loads(found)]
    assert len(reported) == (1 + 1 + 2) * len(INLINE)
    for placement, layout, scored in reported:
        close(f"{placement}, {layout}", scored, expected["teacher"])
