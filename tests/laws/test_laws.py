"""Laws that every estimator with its policy loss obeys, with everything switched on around it."""

import dataclasses

import pytest
import torch
from torch import Tensor

from opd_trainer.estimator.none import NoEstimator
from opd_trainer.loss.aggregation import Aggregation
from opd_trainer.loss.config import KlApply, ReferenceConfig
from opd_trainer.objective import Objective
from opd_trainer.opd.config import OpdConfig, OpdType
from opd_trainer.types import Scores, TokenBatch
from opd_trainer.updates import UpdateResult
from tests.laws.options import (
    ESTIMATORS,
    NAN,
    OPD_CHANGES,
    Surroundings,
    batch_of,
    estimators,
    live_log_probs,
    loss_and_gradient,
    objective,
    same_bits,
    scores,
    surroundings,
)

RAGGED = [[1, 1, 1], [1, 0, 1, 1, 1], [1], [1, 1, 0, 1], [1, 1], [1, 1, 1, 1, 1, 1]]


def entropy_of(batch: TokenBatch) -> Tensor:
    drawn = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(5))
    return torch.where(batch.mask, drawn, NAN)


@estimators
@surroundings
def test_kl_coef_0_is_bit_identical_to_opd_off(name: str, around: Surroundings) -> None:
    batch = batch_of(RAGGED)
    # Whose task reward `only_reward` takes away is not what it would be without a teacher.
    opd = dataclasses.replace(around.opd, kl_coef=0.0, only_reward=False)
    off = objective(ESTIMATORS[name], **around.replace(opd=OpdConfig(type=OpdType.off)))
    zero = objective(ESTIMATORS[name], **around.replace(opd=opd))
    log_probs, entropy = live_log_probs(batch), entropy_of(batch)
    without = loss_and_gradient(off, off.assign(batch), log_probs, entropy)
    with_zero = loss_and_gradient(zero, zero.assign(batch), log_probs, entropy)
    assert all(same_bits(a, b) for a, b in zip(without, with_zero, strict=True))


@estimators
@surroundings
def test_poisoned_masked_entries_reach_neither_loss_nor_gradient(name: str, around: Surroundings) -> None:
    batch = batch_of(RAGGED)
    chosen = objective(ESTIMATORS[name], **around.replace())

    def cured(values: Tensor | None) -> Tensor:
        assert values is not None
        return torch.where(batch.mask, values, -0.5)

    def cured_scores(found: Scores | None) -> Scores:
        assert found is not None
        return scores(cured(found.log_probs), found.model)

    healthy = batch.replace(
        values=cured(batch.values),
        **{field: cured_scores(getattr(batch, field)) for field in ("rollout", "old", "reference", "teacher")},
    )
    log_probs, entropy = live_log_probs(batch), entropy_of(batch)
    poisoned = loss_and_gradient(chosen, chosen.assign(batch), log_probs, entropy)
    expected = loss_and_gradient(chosen, chosen.assign(healthy), cured(log_probs), cured(entropy))
    assert all(bool(torch.isfinite(x).all()) for x in poisoned)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, expected, strict=True))
    assert not bool(poisoned[1][~batch.mask].any())


@estimators
@surroundings
def test_the_order_of_sequences_does_not_matter(name: str, around: Surroundings) -> None:
    batch = batch_of(RAGGED)
    chosen = objective(ESTIMATORS[name], **around.replace())
    log_probs, entropy = live_log_probs(batch), entropy_of(batch)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    # The values of one field travel with `take`, so any per-token tensor can be permuted.
    permuted = batch.take(order)
    permuted_log_probs = batch.replace(values=log_probs).take(order).values
    permuted_entropy = batch.replace(values=entropy).take(order).values
    assert permuted_log_probs is not None
    assert permuted_entropy is not None
    loss, gradient, _ = loss_and_gradient(chosen, chosen.assign(batch), log_probs, entropy)
    expected = batch.replace(values=gradient).take(order).values
    loss_2, gradient_2, _ = loss_and_gradient(chosen, chosen.assign(permuted), permuted_log_probs, permuted_entropy)
    torch.testing.assert_close(loss_2, loss)
    torch.testing.assert_close(gradient_2, expected)


PIECES = {"two": [[0, 1], [2, 3, 4, 5]], "six": [[5], [0], [3], [1], [4], [2]]}
pieces = pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)


@estimators
@surroundings
@pieces
def test_micro_batches_add_up_to_the_whole(name: str, around: Surroundings, pieces: list[list[int]]) -> None:
    adds_up(objective(ESTIMATORS[name], **around.replace()), pieces)


@estimators
@pytest.mark.parametrize("aggregation", Aggregation)
@pieces
def test_micro_batches_add_up_whatever_the_mean(name: str, aggregation: Aggregation, pieces: list[list[int]]) -> None:
    adds_up(objective(dataclasses.replace(ESTIMATORS[name], aggregation=aggregation)), pieces)


def adds_up(chosen: Objective, pieces: list[list[int]]) -> None:
    batch = chosen.assign(batch_of(RAGGED))
    log_probs, entropy = live_log_probs(batch), entropy_of(batch)
    loss, gradient, _ = loss_and_gradient(chosen, batch, log_probs, entropy)
    total = torch.zeros(())
    for piece in pieces:
        part = batch.take(piece)
        part_log_probs, part_entropy, expected = (
            batch.replace(values=x).take(piece).values for x in (log_probs, entropy, gradient)
        )
        assert part_log_probs is not None
        assert part_entropy is not None
        part_loss, part_gradient, _ = loss_and_gradient(chosen, part, part_log_probs, part_entropy)
        torch.testing.assert_close(part_gradient, expected)
        total += part_loss
    torch.testing.assert_close(total, loss)


@estimators
@surroundings
@pytest.mark.parametrize(
    "responses",
    [
        [[], []],
        [[1], [1]],
        [[0, 0], [0]],
        [[], [1, 1]],
        [[0, 0, 0], [1, 0, 1]],
        [[1], [1, 1, 1, 1]],
    ],
    ids=["zero_length", "one_token", "all_masked", "zero_length_and_normal", "masked_and_normal", "eos_only"],
)
def test_degenerate_samples_are_defined(name: str, around: Surroundings, responses: list[list[int]]) -> None:
    batch = batch_of(responses, truncated=torch.arange(len(responses)) == 1)
    chosen = objective(ESTIMATORS[name], **around.replace())
    [minibatch] = chosen.minibatches(chosen.assign(batch))
    log_probs, entropy = live_log_probs(batch), entropy_of(batch)
    results = loss_and_gradient(chosen, minibatch, log_probs, entropy)
    assert all(bool(torch.isfinite(x).all()) for x in results)
    if not bool(batch.mask.any()):
        assert not any(bool(x.any()) for x in results)
    result = UpdateResult(
        log_probs=log_probs,
        entropy=entropy,
        teacher=None,
        loss=float(results[0]),
        grad_norm=0.0,
        learning_rate=0.0,
        seconds={},
        packing_efficiency=1.0,
        num_micro_batches=1,
    )
    metrics = chosen.metrics(minibatch, result)
    assert all(stat.count == 0 or torch.isfinite(torch.tensor(stat.value)) for name, stat in metrics.stats.items())


@estimators
def test_a_teacher_that_scored_nothing_leaves_the_base_advantage(name: str) -> None:
    batch = batch_of(RAGGED)
    silent = batch.replace(teacher=scores(torch.full((batch.num_tokens,), NAN)))
    off = objective(ESTIMATORS[name], opd=OpdConfig(type=OpdType.off))
    on = objective(ESTIMATORS[name])
    log_probs, entropy = live_log_probs(batch), entropy_of(batch)
    without = loss_and_gradient(off, off.assign(batch), log_probs, entropy)
    silenced = loss_and_gradient(on, on.assign(silent), log_probs, entropy)
    assert all(same_bits(a, b) for a, b in zip(without, silenced, strict=True))


@estimators
def test_teacher_equal_to_student_adds_nothing(name: str) -> None:
    batch = batch_of(RAGGED)
    log_probs, entropy = live_log_probs(batch), entropy_of(batch)
    twin = batch.replace(teacher=scores(log_probs))
    off = objective(ESTIMATORS[name], opd=OpdConfig(type=OpdType.off))
    on = objective(ESTIMATORS[name])
    without = loss_and_gradient(off, off.assign(batch), log_probs, entropy)
    with_twin = loss_and_gradient(on, on.assign(twin), log_probs, entropy)
    assert all(torch.equal(a, b) for a, b in zip(without, with_twin, strict=True))


@estimators
def test_on_policy_every_loss_is_the_policy_gradient(name: str) -> None:
    """With the live policy as the old one the gradient is -weight * advantage, whatever the loss."""
    batch = batch_of(RAGGED, old=None)
    chosen = objective(ESTIMATORS[name])
    assigned = chosen.assign(batch)
    log_probs = live_log_probs(batch_of(RAGGED))
    _, gradient, _ = loss_and_gradient(chosen, assigned, log_probs, entropy_of(batch))
    assert assigned.weight is not None
    expected = -assigned.weight * chosen.loss().advantage(log_probs, assigned)
    torch.testing.assert_close(gradient, expected)


@estimators
def test_a_reference_as_reward_changes_the_advantage(name: str) -> None:
    penalty = ReferenceConfig(kl_coef=0.5, apply=KlApply.reward)
    batch = batch_of(RAGGED)
    plain = objective(ESTIMATORS[name]).assign(batch).advantage
    penalised = objective(ESTIMATORS[name], reference=penalty).assign(batch).advantage
    assert plain is not None
    assert penalised is not None
    assert torch.equal(plain, penalised) == isinstance(ESTIMATORS[name], NoEstimator)


def test_every_setting_of_the_term_is_under_the_laws() -> None:
    """A new field of `OpdConfig` gets an entry in `OPD_CHANGES`, or a name here: what does not shape the term."""
    elsewhere = {"type", "kl_coef", "schedule", "log_prob_top_k"}
    varied = {key for changes in OPD_CHANGES.values() for key in changes}
    assert {field.name for field in dataclasses.fields(OpdConfig)} == elsewhere | varied
