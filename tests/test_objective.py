"""What is scored, how weights and the OPD term follow the teacher's validity, minibatches."""

import pickle

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import Incomparable, TeacherError, TrainingDiverged
from opd_trainer.estimator.base import Estimator
from opd_trainer.estimator.grpo import Grpo
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.estimator.ppo import Ppo
from opd_trainer.estimator.reinforce_plus_plus import ReinforcePlusPlus
from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.loss.config import Correction, KlApply, LossConfig, ReferenceConfig
from opd_trainer.opd.config import (
    OpdApply,
    OpdConfig,
    OpdType,
    StudentLogProb,
)
from opd_trainer.updates import Live
from tests.laws.options import NAN, batch_of, live_log_probs, objective, scores
from tests.objectives import DENSE, OFF, RAGGED


def live_of(log_probs: Tensor, entropy: Tensor) -> Live:
    return Live(log_probs=log_probs, entropy=entropy)


@pytest.mark.parametrize(
    ("estimator", "opd", "reference", "options", "needs"),
    [
        (Grpo(), OFF, ReferenceConfig(), LossConfig(), set()),
        (Grpo(), OpdConfig(type=OpdType.megatron), ReferenceConfig(), LossConfig(), set()),
        (Grpo(), OpdConfig(type=OpdType.sglang), ReferenceConfig(), LossConfig(), set()),
        (Grpo(), OFF, ReferenceConfig(kl_coef=0.1), LossConfig(), {"reference"}),
        (Grpo(), OFF, ReferenceConfig(kl_coef=0.1, apply=KlApply.reward), LossConfig(), {"reference", "old"}),
        (Grpo(), OFF, ReferenceConfig(), LossConfig(updates_per_rollout=2), {"old"}),
        (Grpo(), OFF, ReferenceConfig(), LossConfig(epochs_per_rollout=2), {"old"}),
        (Grpo(), OFF, ReferenceConfig(), LossConfig(correction=Correction.tis), set()),
        (Ppo(), OFF, ReferenceConfig(), LossConfig(), {"values"}),
        (
            Ppo(),
            OpdConfig(type=OpdType.megatron, apply=OpdApply.before_normalization),
            ReferenceConfig(),
            LossConfig(),
            {"values", "old", "teacher"},
        ),
        (
            Grpo(),
            OpdConfig(type=OpdType.megatron, student_log_prob=StudentLogProb.old),
            ReferenceConfig(),
            LossConfig(),
            {"old", "teacher"},
        ),
        (
            Grpo(),
            OpdConfig(type=OpdType.megatron, student_log_prob=StudentLogProb.rollout),
            ReferenceConfig(),
            LossConfig(),
            {"teacher"},
        ),
    ],
)
def test_what_must_be_scored_first(
    estimator: Estimator, opd: OpdConfig, reference: ReferenceConfig, options: LossConfig, needs: set[str]
) -> None:
    assert objective(estimator, opd=opd, reference=reference, options=options).needs == needs


@pytest.mark.parametrize(
    ("opd", "top_k", "dense"),
    [
        (OFF, 0, False),
        (OpdConfig(type=OpdType.megatron, log_prob_top_k=4), 4, False),
        # A server's candidates are compared with the engine's, before the update.
        (OpdConfig(type=OpdType.sglang, log_prob_top_k=4), 0, False),
        (OpdConfig(type=OpdType.megatron, divergence=DENSE), 0, True),
        (OpdConfig(type=OpdType.megatron, divergence=DENSE, kl_coef=0.0), 0, False),
    ],
)
def test_what_a_loss_wants_of_the_models(opd: OpdConfig, top_k: int, dense: bool) -> None:
    chosen = objective(Grpo(), opd=opd)
    chosen.assign(batch_of(RAGGED))
    wants = chosen.loss().wants
    assert (wants.top_k, wants.divergence is not None, wants.entropy_gradient) == (top_k, dense, False)


def test_the_whole_loss_golden() -> None:
    # One response of two tokens, rewards unused. q = 1. s = -1, -2; t = -2, -1.5; kl_coef 2: A = -2, 1.
    # Reference KL k2 with r = -1.5, -2: 0.1 * (0.125, 0). Entropy 1 and 2 with coefficient 0.5. Loss = -A + KL - bonus.
    batch = batch_of([[1, 1]], prompt_tokens=1, old=None)
    chosen = objective(
        NoEstimator(),
        opd=OpdConfig(type=OpdType.megatron, kl_coef=2.0),
        reference=ReferenceConfig(kl_coef=0.1),
        options=LossConfig(entropy_coef=0.5),
    )
    batch = chosen.assign(batch).replace(
        teacher=scores(torch.tensor([NAN, -2.0, -1.5])), reference=scores(torch.tensor([NAN, -1.5, -2.0]))
    )
    loss = pickle.loads(pickle.dumps(chosen.loss()))
    assert loss.wants.entropy_gradient
    found = loss(live_of(torch.tensor([NAN, -1.0, -2.0]), torch.tensor([NAN, 1.0, 2.0])), batch)
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0 + 0.0125 - 0.5, -1.0 - 1.0]))


def test_mismatch_correction_multiplies_the_policy_loss_only() -> None:
    # w = exp(s - b) = exp(-1 + 1.5), bounded by 1.5; A = 1.
    batch = batch_of([[1]], prompt_tokens=0, old=None, rollout=scores(torch.tensor([-1.5])))
    chosen = objective(
        Grpo(), opd=OFF, options=LossConfig(correction=Correction.tis, correction_high=1.5, entropy_coef=1.0)
    )
    batch = chosen.assign(batch).replace(advantage=torch.ones(1))
    found = chosen.loss()(live_of(torch.tensor([-1.0]), torch.tensor([0.25])), batch)
    assert float(found) == pytest.approx(-1.5 - 0.25)


def test_failed_tokens_keep_their_base_advantage_and_the_rest_is_a_mean() -> None:
    batch = batch_of([[1, 1], [1, 1]], prompt_tokens=0)
    teacher = torch.tensor([-1.0, -1.0, NAN, NAN])
    chosen = objective(NoEstimator(), opd=OpdConfig(type=OpdType.sglang))
    batch = chosen.assign(batch.replace(teacher=scores(teacher)))
    assert batch.opd_weight is not None
    assert batch.weight is not None
    assert batch.opd_weight.tolist() == [2.0, 2.0, 0.0, 0.0]
    final = chosen.loss().advantage(torch.tensor([-0.5, -1.0, -7.0, -7.0]), batch)
    assert final.tolist() == [-1.0, 0.0, 0.0, 0.0]
    # The weighted mean over all tokens is the plain mean over the scored ones: 0.5 / 2.
    assert float((-final * batch.weight).sum()) == 0.25


def test_an_inline_teacher_counts_everywhere_and_must_answer() -> None:
    batch = batch_of([[1, 1], [1]], prompt_tokens=1, teacher=None)
    chosen = objective(Grpo())
    batch = chosen.assign(batch)
    assert batch.opd_weight is not None
    assert torch.equal(batch.opd_weight, batch.mask.float())
    silent = batch.replace(teacher=scores(torch.full((batch.num_tokens,), NAN)))
    with pytest.raises(TeacherError):
        chosen.loss()(live_of(live_log_probs(batch), live_log_probs(batch)), silent)


def test_log_probs_of_different_temperatures_are_not_subtracted() -> None:
    batch = batch_of([[1, 1]], prompt_tokens=0)
    chosen = objective(Grpo(), temperature=0.7)
    with pytest.raises(Incomparable):
        chosen.loss()(live_of(live_log_probs(batch), live_log_probs(batch)), chosen.assign(batch))


def test_unknown_rewards_are_refused_unless_unused() -> None:
    batch = batch_of([[1], [1]], reward=torch.tensor([1.0, NAN]))
    with pytest.raises(TrainingDiverged):
        objective(Grpo()).assign(batch)
    for chosen in (objective(Grpo(), opd=OpdConfig(type=OpdType.megatron, only_reward=True)), objective(NoEstimator())):
        assigned = chosen.assign(batch)
        assert assigned.advantage is not None
        assert not bool(assigned.advantage.any())
        # The reward stays in the batch, for metrics.
        assert float(assigned.reward[0]) == 1.0


def test_whitening_comes_before_or_after_the_term_as_asked() -> None:
    batch = batch_of(RAGGED)
    after = objective(ReinforcePlusPlus(), opd=OpdConfig(type=OpdType.megatron, student_log_prob=StudentLogProb.old))
    before = objective(ReinforcePlusPlus(), opd=OpdConfig(type=OpdType.megatron, apply=OpdApply.before_normalization))
    plain = objective(ReinforcePlusPlus(), opd=OFF)
    whitened = before.assign(batch).advantage
    assert whitened is not None
    assert float(whitened[batch.mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened[batch.mask].var(correction=0)) == pytest.approx(1, abs=1e-5)
    kept, base = after.assign(batch).advantage, plain.assign(batch).advantage
    assert kept is not None
    assert base is not None
    assert batch.old is not None
    assert batch.teacher is not None
    expected = base - torch.where(batch.mask, batch.old.log_probs - batch.teacher.log_probs, 0.0)
    torch.testing.assert_close(kept, expected)


def test_returns_hold_the_term_only_when_asked() -> None:
    batch = batch_of(RAGGED)
    off = objective(Ppo(), opd=OFF).assign(batch).returns
    apart = objective(Ppo(), opd=OpdConfig(type=OpdType.megatron)).assign(batch).returns
    inside = objective(Ppo(), opd=OpdConfig(type=OpdType.megatron, in_returns=True)).assign(batch)
    assert off is not None
    assert apart is not None
    assert inside.returns is not None
    assert torch.equal(off, apart)
    # With gamma = lambda = 1 a return is the sum of the rewards to go: the first token's falls by the sum of the term.
    assert batch.old is not None
    assert batch.teacher is not None
    term = torch.where(batch.mask, batch.old.log_probs - batch.teacher.log_probs, 0.0)
    for sequence in range(batch.num_sequences):
        tokens = (batch.seq == sequence) & batch.mask
        torch.testing.assert_close((off - inside.returns)[tokens][0], term[tokens].sum())


def test_live_and_frozen_student_log_probs_agree_on_the_first_update() -> None:
    batch = batch_of(RAGGED)
    assert batch.old is not None
    live = objective(Grpo())
    frozen = objective(Grpo(), opd=OpdConfig(type=OpdType.megatron, student_log_prob=StudentLogProb.old))
    first = live.loss().advantage(batch.old.log_probs, live.assign(batch))
    second = frozen.loss().advantage(batch.old.log_probs, frozen.assign(batch))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize(("tokens", "share"), [(None, 1 / (2 * 16)), (4, 1 / (2 * 4))])
def test_the_constant_length_is_the_longest_response_or_what_is_asked_for(tokens: int | None, share: float) -> None:
    chosen = objective(Grpo(aggregation=Aggregation.constant, aggregation_tokens=tokens), max_response_tokens=16)
    weight = chosen.assign(batch_of([[1, 1], [1]], prompt_tokens=0)).weight
    assert weight is not None
    assert weight.tolist() == [share] * 3


def test_one_update_per_rollout_is_the_batch_itself() -> None:
    chosen = objective(Grpo())
    batch = chosen.assign(batch_of(RAGGED))
    assert chosen.minibatches(batch) == [batch]


def test_minibatches_cover_each_epoch_once_in_a_seeded_order() -> None:
    options = LossConfig(updates_per_rollout=2, epochs_per_rollout=3)

    def split(seed: int, step: int) -> list[list[float]]:
        chosen = objective(Grpo(), options=options, seed=seed)
        batch = chosen.assign(batch_of(RAGGED))
        for _ in range(step - 1):
            batch = chosen.assign(batch_of(RAGGED))
        parts = chosen.minibatches(batch)
        for part in parts:
            assert part.weight is not None
            assert float(part.weight.sum()) == pytest.approx(1)
        return [part.reward.tolist() for part in parts]

    first = split(0, 1)
    assert len(first) == 6
    everything = sorted(batch_of(RAGGED).reward.tolist())
    for epoch in range(3):
        assert sorted(first[2 * epoch] + first[2 * epoch + 1]) == everything
    assert split(0, 1) == first
    assert split(0, 2) != first
    assert split(1, 1) != first
    # Nor is the second step of one run the first of its neighbour.
    assert split(1, 1) != split(0, 2)


def test_more_updates_than_sequences_are_as_many_as_sequences() -> None:
    chosen = objective(Grpo(), options=LossConfig(updates_per_rollout=8))
    assert len(chosen.minibatches(chosen.assign(batch_of([[1], [1, 1]])))) == 2
