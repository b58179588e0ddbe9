"""Settings of the loss beside the policy loss: reference KL, entropy bonus, mismatch correction, number of updates."""

from dataclasses import dataclass
from enum import StrEnum, auto


class KlEstimator(StrEnum):
    """Per-token estimator of KL(student || reference), x = s - r (J. Schulman, "Approximating KL divergence", 2020)."""

    k1 = auto()
    """x; unbiased as a reward penalty, but its gradient as a loss is zero."""
    k2 = auto()
    """x^2 / 2; as a loss its gradient is that of the reverse KL."""
    k3 = auto()
    """exp(-x) - 1 + x, never negative; as a loss its gradient is that of the forward KL."""


class KlApply(StrEnum):
    """Where the KL to the reference enters."""

    loss = auto()
    """A term of the loss, backpropagated."""
    reward = auto()
    """A penalty on the reward of each token, before the estimator; needs an old-log-prob pass."""


class ReferencePlacement(StrEnum):
    """Where the reference's weights are."""

    resident = auto()
    """On the device."""
    offload = auto()
    """On the host, and on the device while it scores."""
    swap = auto()
    """On the host, and exchanged with the student's in its own module while it scores."""


@dataclass(slots=True)
class ReferenceConfig:
    """A frozen model that the student is kept close to; loaded only when `kl_coef` is not 0."""

    load: str | None = None
    """Hugging Face folder or checkpoint; null takes the student's initial weights."""
    ckpt_step: int | None = None
    """Iteration of the checkpoint `load` to take; null takes its latest."""
    kl_coef: float = 0.0
    """Coefficient of KL(student || reference), nats^-1, >= 0."""
    apply: KlApply = KlApply.loss
    """loss or reward."""
    estimator: KlEstimator | None = None
    """k1 (reward only), k2 or k3 (loss only); null means k1 as a reward and k2 in the loss, whose gradients are both
    that of the reverse KL."""

    placement: ReferencePlacement = ReferencePlacement.resident
    """resident, offload or swap."""

    @property
    def used(self) -> bool:
        """Whether the reference is needed at all."""
        return self.kl_coef != 0

    @property
    def chosen_estimator(self) -> KlEstimator:
        """`estimator`, or the right one for `apply`."""
        if self.estimator is not None:
            return self.estimator
        return KlEstimator.k1 if self.apply is KlApply.reward else KlEstimator.k2


class Correction(StrEnum):
    """How the mismatch between the trainer's old log-probs o and the engine's b is corrected, w = exp(o - b)."""

    none = auto()
    """Not at all."""
    tis = auto()
    """Truncated importance sampling: the loss of a token is multiplied by clamp(w, low, high)."""
    icepop = auto()
    """Tokens with w outside [low, high] are dropped, the others multiplied by w (IcePop, arXiv 2510.18855)."""


@dataclass(slots=True)
class LossConfig:
    """The parts of the loss that do not depend on the estimator."""

    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus; 0 switches it off."""
    correction: Correction | None = None
    """none, tis or icepop; null means tis for `rollout.mode=one_step_off`, whose samples are of older weights, and
    none otherwise."""
    correction_low: float = 0.0
    """Lower end of the band of the correction, a ratio (IcePop: 0.5)."""
    correction_high: float = 2.0
    """Upper end of the band of the correction, a ratio (IcePop: 5)."""
    updates_per_rollout: int = 1
    """Optimizer steps on each epoch over a rollout batch, which is split at random into as many minibatches."""
    epochs_per_rollout: int = 1
    """Passes over each rollout batch."""
