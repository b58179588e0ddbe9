"""One suite for every place in which a Megatron teacher can live."""

import asyncio
import contextlib
import dataclasses
import pickle
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.divergence.config import DivergenceConfig, DivergenceKind
from opd_trainer.divergence.token import TokenDivergence
from opd_trainer.errors import CheckpointError, OpdError, ShapeMismatch, TeacherError
from opd_trainer.megatron.config import Placement
from opd_trainer.megatron.live_weights import STUDENT
from opd_trainer.megatron.micro_batch import Scoring, prepare
from opd_trainer.megatron.optimizer import has_gradient_buffers
from opd_trainer.megatron.scorer import MegatronScorer
from opd_trainer.megatron.scoring_worker import ScoringSpec
from opd_trainer.megatron.spec import WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import Dtype, Family, ModelConfig
from opd_trainer.protocols import InlineTeacher
from opd_trainer.teacher import config as placements
from opd_trainer.teacher.config import TeacherConfig
from opd_trainer.teacher.dedicated import DedicatedTeacher
from opd_trainer.teacher.inline import MegatronTeacher, checked_teacher, inline_teacher
from opd_trainer.types import Finish, Prompt, Sample, Scores, Signal, TokenBatch
from opd_trainer.updates import Wants
from tests.gloo import run_gloo
from tests.megatron import training
from tests.megatron.training import Distill, started

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
]

INLINE: dict[str, type[TeacherConfig]] = {
    "resident": placements.ResidentTeacher,
    "offload": placements.OffloadTeacher,
    "swap": placements.SwapTeacher,
}
OWN_MODULE = ("resident", "offload")
ALL = (*INLINE, "dedicated", "dedicated, packed")
NOISE = 1e-5
"""Nats by which placements may differ; what they do differ by is printed."""
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Student, a teacher of its shape, and teachers of other shapes; all with the demo's tokenizer."""

    def write(name: str, seed: int, **changes: Any) -> Path:
        return training.write_model(tmp_path_factory.mktemp(name), seed=seed, **changes)

    return {
        "student": write("student", 0),
        "teacher": write("teacher", 1),
        "other": write("other", 2, family=Family.llama, hidden_size=48, num_layers=3, tie_embeddings=False),
        "turned": write("turned", 3, rope_theta=500.0),
    }


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


def config(placement: str, load: Path, *, own_model: bool = False, step: int | None = None) -> TeacherConfig:
    model = ModelConfig() if own_model else None
    return INLINE[placement](load=str(load), model=model, ckpt_step=step)


def spec_with(student: Path, name: str = "default", teacher: TeacherConfig | None = None, **changes: Any) -> WorkerSpec:
    plain = training.spec(student, temperature=TEMPERATURE, **changes)
    assert teacher is not None
    built = inline_teacher(name, teacher, plain.model, plain.megatron, TEMPERATURE)
    return dataclasses.replace(plain, teachers={name: built})


def batch_of(temperature: float = TEMPERATURE) -> TokenBatch:
    batch = training.batch()
    return batch.replace(rollout=dataclasses.replace(batch.rollout, temperature=temperature))


def parts(batch: TokenBatch) -> list[TokenBatch]:
    return [batch.take([0, 3]), batch.take([1]), batch.take([2, 5, 4])]


def samples_of(batch: TokenBatch, teacher: str = "default") -> list[Sample]:
    """The sequences of a batch as samples."""
    samples = []
    for number in range(batch.num_sequences):
        mine = batch.seq == number
        tokens, mask = batch.tokens[mine], batch.mask[mine]
        response = tokens[mask]
        samples.append(
            Sample(
                prompt=Prompt(id=str(number), tokens=tokens[~mask], text="", teacher=teacher),
                index=0,
                response=response,
                log_probs=torch.zeros(len(response)),
                finish=Finish.stop,
                version=0,
                text="",
            )
        )
    return samples


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 120))


async def with_dedicated(
    student: Path,
    teacher: TeacherConfig,
    ask: Callable[[DedicatedTeacher], Coroutine[Any, Any, Any]],
    max_tokens: int = 1,
) -> Any:
    """Asks a dedicated teacher whose only worker is in this process."""
    checked = checked_teacher("default", teacher, ModelConfig(load=str(student)))
    megatron = training.spec(student).megatron
    scoring = Scoring(TEMPERATURE, megatron.log_prob_chunk_tokens)
    spec = ScoringSpec(model=checked.settings, megatron=megatron, scoring=scoring, seed=0)
    scorer = MegatronScorer(InProcessGroup(spec.make_worker), max_tokens=max_tokens, bucket_bytes=1 << 20)
    dedicated = DedicatedTeacher(scorer, checked.identity, temperature=TEMPERATURE, name="default")
    try:
        await dedicated.start()
        return await ask(dedicated)
    finally:
        await dedicated.close()
        await dedicated.close()


async def asked(dedicated: DedicatedTeacher, batch: TokenBatch, *, at_once: bool) -> Tensor:
    """Log-probs of the response tokens of a batch, in its order; the samples land at once or one after the other."""

    async def land(number: int, sample: Sample) -> Sample:
        for _ in range(0 if at_once else 5 * number):
            await asyncio.sleep(0)
        return await dedicated.score(sample)

    judged = await asyncio.gather(*(land(number, sample) for number, sample in enumerate(samples_of(batch))))
    assert all(sample.teacher_temperature == TEMPERATURE for sample in judged)
    return torch.cat([sample.teacher_log_probs for sample in judged if sample.teacher_log_probs is not None])


def scores(placement: str, student: Path, load: Path, *, own_model: bool = False, step: int | None = None) -> Tensor:
    """What a teacher thinks of the response tokens of the batch."""
    batch = batch_of()
    if placement in INLINE:
        teacher = config(placement, load, own_model=own_model, step=step)
        with started(spec_with(student, teacher=teacher)) as worker:
            return worker.score([batch], "teacher")[0][batch.mask]
    model = ModelConfig() if own_model else None
    teacher = placements.DedicatedTeacher(load=str(load), model=model, ckpt_step=step)
    packed = placement == "dedicated, packed"
    return run(with_dedicated(student, teacher, lambda d: asked(d, batch, at_once=packed), 30 if packed else 1))


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, Tensor]:
    """What each model thinks of the batch as a student, alone in its worker."""
    batch = batch_of()
    found = {}
    for name, folder in folders.items():
        with started(training.spec(folder, temperature=TEMPERATURE)) as worker:
            found[name] = worker.score([batch], "student")[0][batch.mask]
    return found


def close(placement: str, ours: Tensor, theirs: Tensor) -> None:
    gap = (ours - theirs).abs()
    print(f"\nfloor of {placement}: max {float(gap.max()):.1e}, mean {float(gap.mean()):.1e} nats")
    assert float(gap.max()) <= NOISE


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


def everything(worker: MegatronWorker) -> dict[str, Tensor]:
    """Copies of the student's parameters, main parameters, moments and gradients."""
    assert worker._student is not None
    assert worker._optimizer is not None
    found = {f"weight {k}": v for m in worker._student.model.modules for k, v in m.named_parameters()}
    found |= {f"gradient {k}": v.main_grad for m in worker._student.model.modules for k, v in m.named_parameters()}
    for inner in worker._optimizer.megatron.chained_optimizers:
        for number, group in enumerate(inner.optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                found[f"main {number} {index}"] = parameter
                state = inner.optimizer.state[parameter]
                found |= {f"{k} {number} {index}": v for k, v in state.items() if isinstance(v, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


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


@contextlib.contextmanager
def worker_with(placement: str, folders: dict[str, Path]) -> Iterator[tuple[MegatronWorker, MegatronTeacher]]:
    with started(spec_with(folders["student"], teacher=config(placement, folders["teacher"]))) as worker:
        teacher = worker._teachers["default"]
        assert isinstance(teacher, MegatronTeacher)
        yield worker, teacher


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


def test_a_dedicated_score_does_not_depend_on_what_arrives_with_it(folders: Any) -> None:
    batch = batch_of()
    samples = samples_of(batch)
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> tuple[list[Sample], list[Sample], dict[str, float]]:
        together = await asyncio.gather(*(dedicated.score(sample) for sample in samples))
        metrics = dedicated.metrics().values()
        return together, [await dedicated.score(sample) for sample in samples], metrics

    together, alone, metrics = run(with_dedicated(folders["student"], teacher, ask))
    assert metrics["perf/dedicated_teacher_samples_per_call"] == sum(len(s.response) > 0 for s in samples)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.teacher_log_probs, b.teacher_log_probs)
        assert a.teacher_log_probs.shape == a.response.shape


def test_a_dedicated_teacher_scores_while_responses_still_arrive() -> None:
    first, second, third = (sample for sample in samples_of(batch_of())[2:5])
    log: list[str] = []

    class Slow:
        """A scorer that takes its time."""

        async def score(self, batch: TokenBatch) -> Tensor:
            log.append(f"scoring {batch.num_sequences}")
            await asyncio.sleep(0.05)
            log.append("scored")
            return torch.where(batch.mask, -1.0, torch.nan)

    async def work() -> list[Sample]:
        dedicated = DedicatedTeacher(Slow(), None, temperature=1.0, name="default")  # type: ignore[arg-type]
        judging = []
        for sample in (first, second, third):
            await asyncio.sleep(0.01)
            log.append("landed")
            judging.append(asyncio.create_task(dedicated.score(sample)))
        return await asyncio.gather(*judging)

    judged = run(work())
    assert log == ["landed", "scoring 1", "landed", "landed", "scored", "scoring 2", "scored"]
    for sample in judged:
        assert torch.equal(sample.teacher_log_probs, torch.full((len(sample.response),), -1.0))


def test_a_dedicated_teacher_leaves_other_samples_alone(folders: Any) -> None:
    other, aborted = samples_of(batch_of(), "maths")[0], samples_of(batch_of())[0].replace(finish=Finish.abort)
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> list[Sample]:
        return [await dedicated.score(sample) for sample in (other, aborted)]

    assert run(with_dedicated(folders["student"], teacher, ask)) == [other, aborted]


def test_a_dedicated_teacher_that_fails_tells_everybody_who_waits(folders: Any) -> None:
    samples = [sample for sample in samples_of(batch_of()) if len(sample.response)]
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> list[Any]:
        await dedicated.close()
        return await asyncio.gather(*(dedicated.score(sample) for sample in samples), return_exceptions=True)

    errors = run(with_dedicated(folders["student"], teacher, ask))
    assert len(errors) == len(samples)
    assert all(isinstance(error, OpdError) for error in errors)


def test_a_dedicated_teacher_never_passes_on_what_is_not_finite(folders: Any) -> None:
    sample = samples_of(batch_of())[0]
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> None:
        worker = dedicated._scorer._shards.group.worker  # type: ignore[attr-defined]
        with torch.no_grad():
            next(worker._model.model.modules[0].parameters()).fill_(torch.nan)
        await dedicated.score(sample)

    with pytest.raises(TeacherError, match="no finite log-prob"):
        run(with_dedicated(folders["student"], teacher, ask))


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


def test_scores_carry_their_temperature(folders: Any) -> None:
    from opd_trainer.collation import collate
    from opd_trainer.errors import Incomparable

    batch = batch_of()
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> list[Sample]:
        return await asyncio.gather(*(dedicated.score(sample) for sample in samples_of(batch)))

    judged = run(with_dedicated(folders["student"], teacher, ask))
    collated = collate(judged, TEMPERATURE)
    assert collated.teacher is not None
    assert collated.teacher.temperature == TEMPERATURE
    collated.rollout.check_comparable(collated.teacher)
    with pytest.raises(Incomparable):
        collate([judged[0], judged[2].replace(teacher_temperature=1.0)], TEMPERATURE)
    hot = Scores(log_probs=collated.rollout.log_probs, temperature=1.0, model="student")
    with pytest.raises(Incomparable):
        hot.check_comparable(collated.teacher)
