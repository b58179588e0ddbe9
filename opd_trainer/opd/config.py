"""Settings of on-policy distillation: who is the teacher, how strong it is and where its term enters."""

from dataclasses import dataclass, field
from enum import StrEnum, auto

from opd_trainer.divergence.config import DivergenceConfig


class OpdType(StrEnum):
    """Who computes the teacher's log-probs."""

    off = auto()
    """No distillation."""
    megatron = auto()
    """A Megatron model (`teacher.load`)."""
    sglang = auto()
    """An SGLang server (`teacher.url`)."""


class OpdApply(StrEnum):
    """When the OPD term is added to the advantage."""

    after_normalization = auto()
    """After whitening, so that `kl_coef` keeps its meaning."""
    before_normalization = auto()
    """Before whitening, which subtracts the term's mean and makes `kl_coef` scale-free (parity with slime)."""


class StudentLogProb(StrEnum):
    """Which student log-prob enters the reverse KL."""

    live = auto()
    """Of the weights that are being updated; computed inside the update."""
    old = auto()
    """Of the weights before the first update on this rollout; needs a pass of its own."""
    rollout = auto()
    """Of the engine that sampled."""


class ScheduleKind(StrEnum):
    """How `kl_coef` changes over the run."""

    constant = auto()
    linear = auto()
    cosine = auto()
    target_kl = auto()
    """A proportional controller that raises the coefficient while the reverse KL is above its target."""


@dataclass(slots=True)
class ScheduleConfig:
    """How `opd.kl_coef` changes over the run; it starts from `opd.kl_coef`."""

    kind: ScheduleKind = ScheduleKind.constant
    """constant, linear, cosine or target_kl."""
    final: float = 0.0
    """linear, cosine: coefficient at the end."""
    steps: int | None = None
    """linear, cosine: training steps until the end is reached; null means the run's length."""
    target: float = 0.05
    """target_kl: reverse KL to hold, nats per token."""
    horizon: int = 10
    """target_kl: steps over which an error of 20 % moves the coefficient by 20 %."""


class TokenWeights(StrEnum):
    """How much each token counts in the OPD term."""

    uniform = auto()
    """All the same."""
    first_fraction = auto()
    """Only the first `fraction` of each response."""
    importance = auto()
    """w_t = 1 + gamma (1 - sum_{i<t} |rkl_i| / sum_i |rkl_i|): early tokens count more (IW-OPD, arXiv 2606.22600)."""


@dataclass(slots=True)
class WeightsConfig:
    """Token weights of the OPD term."""

    kind: TokenWeights = TokenWeights.uniform
    """uniform, first_fraction or importance."""
    fraction: float = 0.3
    """first_fraction: share of each response's unmasked tokens that keep the term, 0..1."""
    gamma: float = 1.0
    """importance: extra weight of the first token, >= 0."""


@dataclass(slots=True)
class OpdConfig:
    """On-policy distillation: A_t <- A_t - kl_coef * (log p_student(y_t) - log p_teacher(y_t))."""

    type: OpdType | None = None
    """off, megatron or sglang; null means not chosen, which is refused."""
    kl_coef: float = 1.0
    """Strength of the term at the start, nats^-1, >= 0."""
    only_reward: bool = False
    """Drop the task reward (set it to 0): the student learns from the teacher alone; a reference KL remains."""
    apply: OpdApply = OpdApply.after_normalization
    """after_normalization or before_normalization (of the advantages)."""
    in_returns: bool = False
    """Make the term a reward of its token, so that discounted returns and a critic's targets hold it."""
    student_log_prob: StudentLogProb = StudentLogProb.live
    """live, old or rollout."""
    log_prob_top_k: int = 0
    """Candidates per position that the teacher reports for the overlap metrics; 0 switches them off."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How `kl_coef` changes over the run."""
    clip: float | None = None
    """Bound on the size of a token's reverse KL, nats; null does not clip."""
    trust_alpha: float = 1.0
    """Share alpha of the teacher in the target alpha p_teacher + (1 - alpha) p_student (TrOPD, arXiv 2606.01249):
    below 1 no token's penalty exceeds -log(1 - alpha); 1 is the plain teacher. In (0, 1]."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Token weights."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """A divergence of whole distributions as a loss, in place of the term in the advantage."""

    @property
    def on(self) -> bool:
        """Whether there is a teacher."""
        return self.type in (OpdType.megatron, OpdType.sglang)

    @property
    def in_update(self) -> bool:
        """Whether the term is added inside the update, from live log-probs, rather than by the controller."""
        return (
            self.on
            and self.apply is OpdApply.after_normalization
            and self.student_log_prob is StudentLogProb.live
            and not self.in_returns
        )
