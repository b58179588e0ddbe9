"""What is optimised: estimator -> whitening -> OPD term -> loss weights. The only place that fixes the order.

T = tokens, N = sequences.
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.divergence.token import TokenDivergence
from opd_trainer.errors import TrainingDiverged
from opd_trainer.estimator.base import Estimator
from opd_trainer.loss.aggregation import loss_weights
from opd_trainer.loss.config import Correction, KlApply, LossConfig, ReferenceConfig
from opd_trainer.loss.correction import correction_weight
from opd_trainer.loss.kl import k3, kl_estimate
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.loss.value import explained_variance
from opd_trainer.metrics import Metrics
from opd_trainer.opd.config import OpdApply, OpdConfig, OpdType, StudentLogProb
from opd_trainer.opd.metrics import advantage_share, likeness, opd_metrics, valid_tokens
from opd_trainer.opd.overlap import overlap_metrics
from opd_trainer.opd.schedule import KlCoefState, begin_step
from opd_trainer.opd.term import opd_weights, subtract_opd_term
from opd_trainer.types import Scores, TokenBatch
from opd_trainer.updates import CriticResult, Live, UpdateResult, Wants

log = logging.getLogger(__name__)

SEED_STRIDE = 1_000_003
"""Keeps the steps of runs with neighbouring seeds apart."""


@dataclass(frozen=True, slots=True)
class LossParts:
    """The loss of each token before masking, by origin; None where a part is not used.

    `advantage` and `correction` are factors of `policy`, for the metrics.
    """

    policy: Float[Tensor, " T"]
    reference_kl: Float[Tensor, " T"] | None
    entropy: Float[Tensor, " T"] | None
    divergence: Float[Tensor, " T"] | None
    advantage: Float[Tensor, " T"]
    correction: Float[Tensor, " T"] | None

    @property
    def total(self) -> Float[Tensor, " T"]:
        """The sum of the parts."""
        total = self.policy
        for part in (self.reference_kl, self.entropy, self.divergence):
            if part is not None:
                total = total + part
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveLoss:
    """The loss of a token: policy loss of the final advantage, KL to the reference, entropy bonus (a `TokenLoss`).

    Masked entries are replaced here, before any arithmetic, so that they reach neither loss nor gradient. Needs whole
    sequences in a micro-batch.

    Attributes:
        policy: the policy loss.
        opd: settings of the OPD term; None when it is not added here.
        kl_coef: strength of the OPD term at this step.
        reference: KL to the reference.
        options: entropy bonus and mismatch correction.
        temperature: of the live log-probs.
    """

    policy: PolicyLoss
    opd: OpdConfig | None
    kl_coef: float
    reference: ReferenceConfig
    options: LossConfig
    temperature: float

    @property
    def wants(self) -> Wants:
        """See `TokenLoss`."""
        asked = self.opd if self.opd is not None else OpdConfig(type=OpdType.off)
        return Wants(
            entropy_gradient=self.options.entropy_coef != 0,
            top_k=asked.log_prob_top_k if asked.type is OpdType.megatron else 0,
            divergence=TokenDivergence(asked.divergence) if asked.divergence.dense and self.kl_coef != 0 else None,
        )

    def __call__(self, live: Live, batch: TokenBatch) -> Float[Tensor, " T"]:
        """Loss per token, finite, 0 where masked."""
        return torch.where(batch.mask, self.parts(live, batch).total, 0.0)

    def parts(self, live: Live, batch: TokenBatch) -> LossParts:
        """The parts of the loss; masked entries are finite and without meaning."""
        mask = batch.mask
        log_probs, old = self._live_and_old(live.log_probs, batch)
        advantage = self.advantage(live.log_probs.detach(), batch)
        policy = self.policy(log_probs, old, advantage, batch)
        correction = None
        if self.options.correction not in (None, Correction.none):
            correction = correction_weight(self.options, old, torch.where(mask, batch.rollout.log_probs, 0.0))
            policy = policy * correction
        bonus = self.options.entropy_coef
        return LossParts(
            policy=policy,
            reference_kl=self._reference_kl(log_probs, batch),
            entropy=-bonus * torch.where(mask, live.entropy, 0.0) if bonus else None,
            divergence=self._divergence(live, batch),
            advantage=advantage,
            correction=correction,
        )

    def advantage(self, student: Float[Tensor, " T"], batch: TokenBatch) -> Float[Tensor, " T"]:
        """The final advantage: with the OPD term where it is added here, 0 where masked."""
        assert batch.advantage is not None
        advantage = torch.where(batch.mask, batch.advantage, 0.0)
        if self.opd is None or self.opd.divergence.dense or self.kl_coef == 0:
            return advantage
        assert batch.teacher is not None
        live = Scores(log_probs=student, temperature=self.temperature, model="student")
        live.check_comparable(batch.teacher)
        return subtract_opd_term(advantage, student, batch.teacher.log_probs, batch, opd=self.opd, kl_coef=self.kl_coef)

    def clipped(
        self, log_probs: Float[Tensor, " T"], advantage: Float[Tensor, " T"], batch: TokenBatch
    ) -> Bool[Tensor, " T"]:
        """Unmasked tokens whose ratio the policy loss clips, for the final `advantage`."""
        live, old = self._live_and_old(log_probs.detach(), batch)
        return self.policy.clipped(live, old, advantage, batch) & batch.mask

    def _live_and_old(
        self, log_probs: Float[Tensor, " T"], batch: TokenBatch
    ) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
        """Both 0 where masked. On the first update on a rollout the live policy is the old one."""
        live = torch.where(batch.mask, log_probs, 0.0)
        old = live.detach() if batch.old is None else torch.where(batch.mask, batch.old.log_probs, 0.0)
        return live, old

    def _divergence(self, live: Live, batch: TokenBatch) -> Float[Tensor, " T"] | None:
        """kl_coef * divergence, over the tokens that the teacher scored as the term in the advantage would be."""
        if live.divergence is None:
            return None
        assert batch.opd_weight is not None
        return self.kl_coef * batch.opd_weight * torch.where(batch.mask, live.divergence, 0.0)

    def _reference_kl(self, live: Float[Tensor, " T"], batch: TokenBatch) -> Float[Tensor, " T"] | None:
        if not self.reference.used or self.reference.apply is not KlApply.loss:
            return None
        assert batch.reference is not None
        reference = torch.where(batch.mask, batch.reference.log_probs, 0.0)
        return self.reference.kl_coef * kl_estimate(self.reference.chosen_estimator, live, reference)


@dataclass(slots=True, kw_only=True)
class Objective:
    """Advantages, loss weights, minibatches, loss and metrics of a run; its only state is that of the KL coefficient.

    Attributes:
        estimator: base advantages and the policy loss.
        opd: on-policy distillation.
        reference: KL to the reference.
        options: entropy bonus, mismatch correction, updates per rollout.
        temperature: of all log-probs.
        max_response_tokens: default length of the `constant` aggregation.
        total_steps: length of the run, for the schedule of the coefficient.
        seed: of the split into minibatches.
        share: of the OPD term in this step's advantages, where it is added here.
    """

    estimator: Estimator
    opd: OpdConfig
    reference: ReferenceConfig
    options: LossConfig
    temperature: float
    max_response_tokens: int
    total_steps: int
    seed: int
    state: KlCoefState = field(init=False)
    share: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.state = KlCoefState(self.opd.kl_coef)

    @property
    def needs(self) -> frozenset[str]:
        """What must be scored before `assign`: among "old", "reference", "values" and "teacher"."""
        on_controller = self.opd.on and not self.opd.in_update
        found = set(self.estimator.needs & {"values"})
        if self._num_updates > 1 or self._penalises_reference or (on_controller and not self._from_rollout):
            found.add("old")
        if self.reference.used:
            found.add("reference")
        if on_controller:
            found.add("teacher")
        return frozenset(found)

    def assign(self, batch: TokenBatch) -> TokenBatch:
        """Begins a step: fixes KL coefficient, loss weights and advantages.

        Raises:
            TrainingDiverged: an estimator that needs rewards got one that is not finite.
        """
        self.state = begin_step(self.opd, self.state, self.total_steps)
        batch = self._with_weights(batch)
        token_rewards = self._token_rewards(batch)
        if self._term_is_reward:
            token_rewards = self._subtract_term(token_rewards, batch)
        base = self.estimator(batch.replace(reward=self._rewards(batch)), token_rewards)
        advantage = base.advantage
        if self._on_controller and self.opd.apply is OpdApply.before_normalization:
            advantage = self._with_term(advantage, batch)
        if self.estimator.whiten:
            advantage = jagged.whiten(advantage, batch.mask)
        if self._on_controller and self.opd.apply is OpdApply.after_normalization:
            advantage = self._with_term(advantage, batch)
        return batch.replace(advantage=advantage, returns=base.returns)

    def minibatches(self, batch: TokenBatch) -> list[TokenBatch]:
        """The batches of the optimizer steps on one rollout batch, each with weights of its own.

        One batch, in its own order, in the plain case; otherwise each epoch splits the sequences at random.
        """
        if self._num_updates == 1:
            return [batch]
        order = torch.Generator().manual_seed(self.seed * SEED_STRIDE + self.state.step)
        pieces = min(self.options.updates_per_rollout, batch.num_sequences)
        epochs = range(self.options.epochs_per_rollout)
        orders = [torch.randperm(batch.num_sequences, generator=order) for _ in epochs]
        return [self._with_weights(batch.take(part)) for whole in orders for part in whole.tensor_split(pieces)]

    def loss(self) -> ObjectiveLoss:
        """The loss of this step's updates."""
        return ObjectiveLoss(
            policy=self.estimator.loss,
            opd=self.opd if self.opd.in_update else None,
            kl_coef=self.state.kl_coef if self.opd.on else 0.0,
            reference=self.reference,
            options=self.options,
            temperature=self.temperature,
        )

    def metrics(self, batch: TokenBatch, result: UpdateResult) -> Metrics:
        """The metrics of one update, from the minibatch that was sent and what came back."""
        if result.teacher is not None:
            teacher = Scores(log_probs=result.teacher, temperature=self.temperature, model="teacher")
            batch = batch.replace(teacher=teacher)
        mask, weight = batch.mask, batch.weight
        assert weight is not None
        loss = self.loss()
        parts = loss.parts(result.live, batch)
        metrics = Metrics().put("train/loss", result.loss).put("train/grad_norm", result.grad_norm)
        metrics.put("train/lr", result.learning_rate)
        metrics.put("train/pg_loss", _weighted(parts.policy, weight, mask))
        metrics.mean("train/clip_fraction", loss.clipped(result.log_probs, parts.advantage, batch).float(), mask)
        metrics.mean("train/advantage", parts.advantage, mask).mean("rollout/entropy", result.entropy, mask)
        if parts.correction is not None:
            metrics.mean("train/correction_weight", parts.correction, mask)
        if parts.reference_kl is not None:
            metrics.put("train/kl_loss", _weighted(parts.reference_kl, weight, mask))
        if batch.old is not None:
            metrics.mean("train/approx_kl", k3(torch.where(mask, result.log_probs - batch.old.log_probs, 0.0)), mask)
        if result.critic is not None:
            metrics.update(self._critic_metrics(batch, result.critic))
        gap = (result.log_probs - batch.rollout.log_probs).abs()
        metrics.mean("train/rollout_log_prob_diff", gap, mask & torch.isfinite(batch.rollout.log_probs))
        return metrics.update(self._opd_metrics(batch, result, parts)) if self.opd.on else metrics

    def state_dict(self) -> dict[str, Any]:
        """The state of the KL coefficient, as JSON."""
        return self.state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.state = KlCoefState(**state)

    def _critic_metrics(self, batch: TokenBatch, critic: CriticResult) -> Metrics:
        loss = self.estimator.critic_loss
        assert loss is not None
        assert batch.values is not None
        assert batch.returns is not None
        metrics = Metrics().put("train/value_loss", critic.loss).put("train/critic_grad_norm", critic.grad_norm)
        metrics.put("train/critic_lr", critic.learning_rate)
        clipped = loss.clipped(critic.values, batch.values, batch.returns, batch.mask)
        metrics.mean("train/value_clip_fraction", clipped.float(), batch.mask)
        metrics.mean("train/value", batch.values, batch.mask).mean("train/return", batch.returns, batch.mask)
        # Of the values that made the advantages. Undefined where the returns do not vary.
        explained = explained_variance(batch.values, batch.returns, batch.mask)
        return metrics.put("train/explained_variance", explained, count=0.0 if math.isnan(explained) else 1.0)

    def _opd_metrics(self, batch: TokenBatch, result: UpdateResult, parts: LossParts) -> Metrics:
        """Metrics of the OPD term; remembers the reverse KL for the schedule."""
        if batch.teacher is None:
            return Metrics()
        assert batch.advantage is not None
        student, teacher = result.log_probs, batch.teacher.log_probs
        metrics = opd_metrics(student, teacher, batch.mask, batch).put("opd/kl_coef", self.state.kl_coef)
        valid = valid_tokens(teacher, batch.mask)
        if parts.divergence is not None and result.divergence is not None:
            assert batch.weight is not None
            metrics.mean("opd/divergence", result.divergence, batch.mask)
            metrics.put("train/opd_loss", _weighted(parts.divergence, batch.weight, batch.mask))
        elif self.opd.in_update:
            share = advantage_share(batch.advantage, parts.advantage, valid)
            metrics.put("opd/advantage_share", share, int(valid.sum()))
        elif self._on_controller:
            metrics.put("opd/advantage_share", self.share)
        if result.overlap is not None:
            metrics.update(overlap_metrics(result.overlap))
        if self.state.step == 1 and not self.state.kl_tokens:
            warning = likeness(student, teacher, batch.rollout.log_probs, batch.mask)
            if warning is not None:
                log.warning(warning)
        measured = float(torch.where(valid, student - teacher, 0.0).sum(dtype=torch.float64))
        self.state = self.state.observe(measured, int(valid.sum()))
        return metrics

    @property
    def _num_updates(self) -> int:
        return self.options.updates_per_rollout * self.options.epochs_per_rollout

    @property
    def _penalises_reference(self) -> bool:
        return self.reference.used and self.reference.apply is KlApply.reward

    @property
    def _from_rollout(self) -> bool:
        return self.opd.student_log_prob is StudentLogProb.rollout

    @property
    def _term_is_reward(self) -> bool:
        return self.opd.on and self.opd.in_returns

    @property
    def _on_controller(self) -> bool:
        """Whether the term is subtracted from an advantage here."""
        return self.opd.on and not self.opd.in_update and not self.opd.in_returns

    def _rewards(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        if "reward" not in self.estimator.needs or (self.opd.on and self.opd.only_reward):
            return torch.zeros_like(batch.reward)
        if not bool(torch.isfinite(batch.reward).all()):
            raise TrainingDiverged(f"rewards of the batch are not finite: {batch.reward.tolist()}")
        return batch.reward

    def _token_rewards(self, batch: TokenBatch) -> Float[Tensor, " T"]:
        """-kl_coef * KL estimate where the reference is a reward, 0 elsewhere."""
        if not self._penalises_reference:
            return torch.zeros(batch.num_tokens)
        assert batch.old is not None
        assert batch.reference is not None
        batch.old.check_comparable(batch.reference)
        old = torch.where(batch.mask, batch.old.log_probs, 0.0)
        reference = torch.where(batch.mask, batch.reference.log_probs, 0.0)
        return -self.reference.kl_coef * kl_estimate(self.reference.chosen_estimator, old, reference)

    def _subtract_term(self, values: Float[Tensor, " T"], batch: TokenBatch) -> Float[Tensor, " T"]:
        """The OPD term from frozen student log-probs."""
        student = batch.rollout if self._from_rollout else batch.old
        assert student is not None
        assert batch.teacher is not None
        student.check_comparable(batch.teacher)
        return subtract_opd_term(
            values, student.log_probs, batch.teacher.log_probs, batch, opd=self.opd, kl_coef=self.state.kl_coef
        )

    def _with_term(self, advantage: Float[Tensor, " T"], batch: TokenBatch) -> Float[Tensor, " T"]:
        """The advantage with the OPD term, whose share in it is kept for the metrics."""
        final = self._subtract_term(advantage, batch)
        assert batch.teacher is not None
        self.share = advantage_share(advantage, final, valid_tokens(batch.teacher.log_probs, batch.mask))
        return final

    def _with_weights(self, batch: TokenBatch) -> TokenBatch:
        """Loss weights of one optimizer step, and the factor on the OPD term that goes with them."""
        tokens = self.estimator.aggregation_tokens or self.max_response_tokens
        weight = loss_weights(self.estimator.aggregation, batch.seq, batch.mask, batch.num_sequences, tokens)
        if not self.opd.on:
            return batch.replace(weight=weight)
        # An inline teacher scores every token.
        valid = batch.mask if batch.teacher is None else valid_tokens(batch.teacher.log_probs, batch.mask)
        return batch.replace(weight=weight, opd_weight=opd_weights(weight, valid))


def _weighted(values: Float[Tensor, " T"], weight: Float[Tensor, " T"], mask: Bool[Tensor, " T"]) -> float:
    return float(torch.where(mask, values * weight, 0.0).sum(dtype=torch.float64))
