"""The critic: which positions it judges, that it learns, resumes bit-exactly, and is the same over processes."""

import asyncio
import dataclasses
import functools
import json
import pickle
from pathlib import Path

import pytest
import torch

from opd_trainer import jagged
from opd_trainer.cluster.inprocess import InProcessGroup
from opd_trainer.errors import CheckpointError, TrainingDiverged
from opd_trainer.loss.value import ValueLoss, explained_variance
from opd_trainer.megatron.critic import Critic
from opd_trainer.megatron.learner import MegatronLearner
from opd_trainer.megatron.micro_batch import prepare
from opd_trainer.megatron.spec import CriticSpec, RankCritic, WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import ModelConfig
from opd_trainer.types import TokenBatch
from opd_trainer.updates import UpdateResult
from tests.gloo import run_gloo
from tests.megatron import training
from tests.megatron.training import WeightedNll, started, weights

PARTS = ([0, 3], [1], [], [2, 5, 4])
UNCLIPPED = ValueLoss(clip=1e9)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return training.write_model(tmp_path_factory.mktemp("student"))


def spec(student: Path, *, load: Path | None = None, loss: ValueLoss = UNCLIPPED, **changes) -> WorkerSpec:
    """A student with a critic; the critic's optimizer has the student's settings, but a learning rate of its own."""
    plain = training.spec(student, **changes)
    settings = dataclasses.replace(plain.megatron.optimizer, lr=3e-3)
    critic = CriticSpec(model=ModelConfig(load=str(load or student)), optimizer=settings, loss=loss)
    return dataclasses.replace(plain, critic=critic)


def judged(batch: TokenBatch | None = None, seed: int = 3) -> TokenBatch:
    """A batch with values and returns, NaN where masked."""
    batch = training.batch() if batch is None else batch
    drawn = torch.randn(2, batch.num_tokens, generator=torch.Generator().manual_seed(seed))
    values, returns = torch.where(batch.mask, drawn, torch.nan)
    return batch.replace(values=values, returns=returns)


def critic_of(worker: MegatronWorker) -> Critic:
    assert worker._critic is not None
    return worker._critic


def set_head(worker: MegatronWorker, seed: int = 5) -> None:
    """Gives the head weights, without which every value is 0 and no gradient reaches the layers below."""
    head = critic_of(worker).loaded.model.modules[0].get_parameter("output_layer.weight")
    with torch.no_grad():
        head.copy_(0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)))


def gradient(worker: MegatronWorker) -> torch.Tensor:
    return torch.cat([p.main_grad.flatten() for chunk in critic_of(worker).chunks for p in chunk.parameters()])


def step(worker: MegatronWorker, micro_batches: list[TokenBatch]) -> RankCritic:
    result = worker.update(micro_batches, WeightedNll()).critic
    assert result is not None
    return result


def critic_weights(worker: MegatronWorker) -> torch.Tensor:
    modules = critic_of(worker).loaded.model.modules
    return torch.cat([p.detach().flatten().clone() for module in modules for p in module.parameters()])


def test_it_starts_from_the_student_and_values_everything_0(student):
    batch = training.batch()
    with started(spec(student)) as worker:
        values = worker.score([batch], "critic")[0]
        critic, ours = critic_of(worker).loaded.model, worker._student
        assert ours is not None
        theirs = dict(ours.model.modules[0].named_parameters())
        shared = {name: p for name, p in critic.modules[0].named_parameters() if name != "output_layer.weight"}
        assert set(shared) == set(theirs)
        assert all(torch.equal(p, theirs[name]) for name, p in shared.items())
    assert torch.equal(values.isnan(), ~batch.mask)
    assert bool((values[batch.mask] == 0).all())


def test_a_value_is_that_of_the_tokens_before(student):
    batch = training.batch((3, 2), (4, 5))
    changed = batch.replace(tokens=torch.where(torch.arange(batch.num_tokens) == 5, 20 - batch.tokens, batch.tokens))
    with started(spec(student)) as worker:
        set_head(worker)
        before, after = worker.score([batch, changed], "critic")
        hidden = prepare(batch, worker._runtime)
        model = critic_of(worker).loaded.model
        everywhere = dataclasses.replace(hidden.packed, select=torch.arange(batch.num_tokens))
        rows = model.forward(everywhere).detach().squeeze(1)
    index = batch.mask.nonzero().squeeze(1)
    torch.testing.assert_close(before[index], rows[index - 1])
    # Token 5 is the first sequence's third response token: its own value does not know it, the next one does.
    assert torch.equal(before[index[index <= 5]], after[index[index <= 5]])
    assert before[6] != after[6]
    assert torch.equal(before[index[index > 6]], after[index[index > 6]])


def test_an_update_steps_both_and_the_student_does_not_notice(student):
    batch = judged()
    with started(training.spec(student)) as worker:
        alone = [worker.update([batch], WeightedNll()) for _ in range(2)]
        expected = weights(worker)
    with started(spec(student)) as worker:
        both = [worker.update([batch], WeightedNll()) for _ in range(2)]
        live = worker.score([batch], "critic")[0]
        found = weights(worker)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for ours, theirs in zip(both, alone, strict=True):
        assert (ours.loss, ours.grad_norm, ours.learning_rate) == (theirs.loss, theirs.grad_norm, theirs.learning_rate)
        assert (theirs.critic, set(ours.seconds) - set(theirs.seconds)) == (None, {"critic"})
    first, second = (result.critic for result in both)
    assert first is not None
    assert second is not None
    assert torch.equal(first.values[0].isnan(), ~batch.mask)
    assert bool((first.values[0][batch.mask] == 0).all())
    assert batch.weight is not None
    assert batch.returns is not None
    assert first.loss == pytest.approx(float((batch.weight * batch.returns.square() / 2)[batch.mask].sum()), abs=1e-6)
    assert (first.learning_rate, both[0].learning_rate) == (3e-3, 1e-2)
    assert second.grad_norm > 0
    assert not torch.equal(live[batch.mask], second.values[0][batch.mask])


def test_it_learns_what_there_is_to_learn(student):
    """Returns of the task "1 if the first prompt token is even, else 0" can be told from every prefix."""
    generator = torch.Generator().manual_seed(0)
    count, prompt, response = 32, 3, 4
    lengths = torch.full((count,), prompt + response)
    tokens = torch.randint(0, 20, (int(lengths.sum()),), generator=generator)
    seq, mask = jagged.seq_from_lengths(lengths), jagged.positions(lengths) >= prompt
    firsts = tokens[jagged.positions(lengths) == 0]
    returns = torch.where(mask, (firsts % 2 == 0).float()[seq], torch.nan)
    empty = training.batch((prompt,) * count, (response,) * count)
    batch = empty.replace(tokens=tokens, weight=mask / mask.sum(), returns=returns)
    explained = []
    with started(spec(student, clip_grad=0.0)) as worker:
        for _ in range(40):
            values = worker.score([batch], "critic")[0]
            explained.append(explained_variance(values, returns, mask))
            worker.update([batch.replace(values=values)], WeightedNll())
    assert explained[0] == 0.0
    assert explained[-1] > 0.9


@pytest.mark.parametrize("parts", [PARTS, [[1], [0, 2, 3, 4, 5]]])
def test_micro_batches_change_neither_loss_nor_gradient(student, parts):
    batch = judged()
    outcomes = []
    for pieces in ([list(range(6))], parts):
        with started(spec(student, clip_grad=0.0)) as worker:
            set_head(worker)
            outcomes.append((step(worker, [batch.take(piece) for piece in pieces]), gradient(worker)))
    (whole, expected), (split, found) = outcomes
    assert split.loss == pytest.approx(whole.loss, abs=1e-6)
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_learner_puts_the_values_of_all_micro_batches_together(student):
    batch = judged()

    async def learn() -> tuple[torch.Tensor, UpdateResult, torch.Tensor]:
        group = InProcessGroup(functools.partial(MegatronWorker, spec(student)))
        learner = MegatronLearner(group, max_tokens=16, bucket_bytes=1 << 20)
        await learner.start()
        try:
            results = [await learner.update(batch, WeightedNll()) for _ in range(2)]
            return await learner.score(batch, "values"), results[1], await learner.score(batch, "critic")
        finally:
            await learner.close()

    after, second, same = asyncio.run(learn())
    assert second.num_micro_batches == 4
    assert torch.equal(after.nan_to_num(7), same.nan_to_num(7))
    with started(spec(student)) as worker:
        first, expected = (step(worker, [batch]) for _ in range(2))
        values = worker.score([batch], "critic")[0]
    assert second.critic is not None
    assert second.critic.loss == pytest.approx(expected.loss, abs=1e-5)
    assert second.critic.loss != pytest.approx(first.loss, abs=1e-5)
    assert second.critic.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert second.critic.learning_rate == 3e-3
    torch.testing.assert_close(second.critic.values, expected.values[0], atol=1e-3, rtol=1e-3, equal_nan=True)
    torch.testing.assert_close(after, values, atol=2e-3, rtol=2e-3, equal_nan=True)


def test_only_tokens_on_the_way_to_their_target_are_clipped(student):
    batch = training.batch()
    with started(spec(student, loss=ValueLoss(clip=0.2))) as worker:
        set_head(worker)
        live = worker.score([batch], "critic")[0]
        # The values have moved by 1 from the old ones: towards a target that is 1 ahead, and beyond one that is 5 back.
        ahead, back = (batch.replace(values=live - 1, returns=live + far) for far in (1.0, -5.0))
        stopped = step(worker, [ahead])
        pulled = step(worker, [back])
    assert (stopped.grad_norm, pulled.grad_norm > 0) == (0.0, True)
    assert batch.weight is not None
    weight = float(batch.weight.sum())
    assert stopped.loss == pytest.approx(weight * 1.8**2 / 2, rel=1e-4)


def test_a_step_with_nothing_to_learn_leaves_it(student):
    batch = judged(training.batch((3, 2), (0, 0)))
    with started(spec(student, weight_decay=0.0)) as worker:
        before = critic_weights(worker)
        result = step(worker, [batch])
        assert (result.loss, result.grad_norm) == (0.0, 0.0)
        assert torch.equal(critic_weights(worker), before)


def test_a_value_loss_that_is_not_finite_stops_the_run(student):
    batch = judged()
    poisoned = batch.replace(returns=torch.full((batch.num_tokens,), torch.inf))
    with (
        started(spec(student)) as worker,
        pytest.raises(TrainingDiverged, match=r"critic step 0, micro-batch 0: .* the live values are finite"),
    ):
        worker.update([poisoned], WeightedNll())


@pytest.mark.parametrize("changes", [{}, {"distributed_optimizer": True}])
@pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_resume_is_bit_exact(student, tmp_path, changes):
    settings = spec(student, schedule="cosine", warmup_steps=2, **changes)
    batches = [judged(training.batch(seed=number), seed=number) for number in range(5)]
    with started(settings) as worker:
        for batch in batches[:3]:
            worker.update([batch], WeightedNll())
        worker.save(tmp_path)
        saved = worker.score(batches[:1], "critic")[0]
        uninterrupted = [step(worker, [batch]) for batch in batches[3:]]
        expected = critic_weights(worker)
    with started(settings) as worker:
        worker.restore(tmp_path)
        resumed = [step(worker, [batch]) for batch in batches[3:]]
        assert torch.equal(critic_weights(worker), expected)
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        assert (ours.loss, ours.grad_norm, ours.learning_rate) == (theirs.loss, theirs.grad_norm, theirs.learning_rate)
        assert torch.equal(ours.values[0].nan_to_num(7), theirs.values[0].nan_to_num(7))
    assert json.loads((tmp_path / "critic" / "config.json").read_text())["architectures"] == [
        "Qwen3ForSequenceClassification"
    ]
    # A critic of another run starts a new one, head included; a student does not start from a critic.
    with started(spec(student, load=tmp_path / "critic", **changes)) as worker:
        assert torch.equal(worker.score(batches[:1], "critic")[0].nan_to_num(7), saved.nan_to_num(7))
    with (
        pytest.raises(CheckpointError, match="a value model, which gives no log-probs"),
        started(training.spec(student, model=ModelConfig(load=str(tmp_path / "critic")))),
    ):
        pass
    assert bool((saved[batches[0].mask] != 0).all())


def test_a_checkpoint_without_a_critic_is_refused_and_starts_one(student, tmp_path):
    with started(training.spec(student)) as worker:
        worker.update([training.batch()], WeightedNll())
        worker.save(tmp_path)
        trained = weights(worker)
    with started(spec(student)) as worker, pytest.raises(CheckpointError, match="critic: cannot be loaded"):
        worker.restore(tmp_path)
    with started(spec(student, load=tmp_path)) as worker:
        assert bool((worker.score([training.batch()], "critic")[0][training.batch().mask] == 0).all())
        norm = critic_of(worker).loaded.model.modules[0].get_parameter("decoder.final_layernorm.weight")
        assert torch.equal(norm, trained["model.norm.weight"])


def train(rank: int, world_size: int, rendezvous: str, folders: tuple[Path, Path], layouts: list[dict]) -> bytes:
    """Two updates around a save and restore in each layout; data-parallel ranks share the micro-batches."""
    student, folder = folders
    batch = judged()
    outcomes = []
    for number, layout in enumerate(layouts):
        worker = MegatronWorker(spec(student, clip_grad=0.0, **layout), rank, world_size, f"{rendezvous}{number}")
        worker.start()
        try:
            if worker._runtime.is_last_stage:
                set_head(worker)
            place = worker.place()
            mine = [batch.take(part) for part in PARTS[place.dp_rank :: place.dp_size]]
            first = step(worker, mine)
            grads = gradient(worker)
            saved = folder / str(number)
            saved.mkdir(parents=True, exist_ok=True)
            worker.save(saved)
            second = step(worker, mine)
            worker.restore(saved)
            assert step(worker, mine).grad_norm == second.grad_norm
            outcomes.append((place, first, second, grads, worker.score([batch], "critic")[0]))
        finally:
            worker.close()
    return pickle.dumps(outcomes)


LAYOUTS = [
    {},
    {"tensor_parallel": 2},
    {"tensor_parallel": 2, "sequence_parallel": True},
    {"pipeline_parallel": 2},
    {"context_parallel": 2},
]


def test_ranks_of_every_layout_equal_one(student, tmp_path):
    (alone,) = pickle.loads(train(0, 1, (tmp_path / "rendezvous").as_uri(), (student, tmp_path / "alone"), [{}]))
    _, first, second, expected, values = alone
    ranks = [pickle.loads(result) for result in run_gloo(train, 2, (student, tmp_path / "both"), LAYOUTS)]
    data, *others = zip(*ranks, strict=True)
    torch.testing.assert_close(data[0][3], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(data[0][3], data[1][3])
    for number, ours in ((1, first), (2, second)):
        assert sum(rank[number].loss for rank in data) == pytest.approx(ours.loss, abs=1e-5)
        for rank in (*data, *(rank for layout in others for rank in layout)):
            assert rank[number].grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)
        for layout in others:
            (reported,) = (rank for rank in layout if rank[0].reports)
            assert reported[number].loss == pytest.approx(ours.loss, abs=1e-5)
            for a, b in zip(reported[number].values, ours.values, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, equal_nan=True)
            torch.testing.assert_close(reported[4], values, atol=2e-3, rtol=2e-3, equal_nan=True)


def test_specs_travel(student):
    settings = spec(student)
    assert pickle.loads(pickle.dumps(settings)) == settings
