"""Which divergence between student and teacher is minimised."""

from dataclasses import dataclass
from enum import StrEnum, auto


class DivergenceKind(StrEnum):
    """What a teacher's whole distribution is used for."""

    sampled = auto()
    """Nothing: the reverse KL of the sampled token enters the advantage."""
    reverse_kl = auto()
    """KL(student || teacher) over the whole vocabulary."""
    forward_kl = auto()
    """KL(teacher || student) over the whole vocabulary."""
    jsd = auto()
    """Generalised Jensen-Shannon divergence over the whole vocabulary."""
    topk_reverse_kl = auto()
    """Reverse KL on the student's k likeliest tokens and one bucket for all others: a lower bound."""
    topk_forward_kl = auto()
    """Forward KL on the teacher's k likeliest tokens and one bucket for all others: a lower bound."""
    student_topk_sampled_tail = auto()
    """Reverse KL on the student's k likeliest tokens, and its score function where the sampled token is none of them:
    its expected gradient is exactly that of the reverse KL."""


@dataclass(slots=True)
class DivergenceConfig:
    """A divergence as a loss, in place of the OPD term in the advantage: opd.kl_coef times it, at every position of a
    response. Needs the teacher's logits where the student's are: opd=megatron teacher=resident."""

    kind: DivergenceKind = DivergenceKind.sampled
    """sampled (no divergence loss), reverse_kl, forward_kl, jsd, topk_reverse_kl, topk_forward_kl or
    student_topk_sampled_tail."""
    beta: float = 0.5
    """jsd: weight of the teacher in the mixture, 0 (forward KL) to 1 (reverse KL)."""
    top_k: int = 64
    """topk kinds: candidates per position, at least 1."""

    @property
    def dense(self) -> bool:
        """Whether the teacher's whole distribution is needed."""
        return self.kind is not DivergenceKind.sampled
