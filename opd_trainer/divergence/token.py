"""The divergence of each position from the logits of student and teacher: what a training worker evaluates.

R = positions (a chunk), P = columns of this rank.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from opd_trainer.divergence.config import DivergenceConfig, DivergenceKind
from opd_trainer.divergence.kl import forward_kl, jsd, reverse_kl
from opd_trainer.divergence.softmax import log_softmax
from opd_trainer.divergence.topk import student_topk_sampled_tail, with_tail
from opd_trainer.vocabulary import WHOLE, VocabularyShards


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """A `Divergence`: see `DivergenceKind`.

    Attributes:
        options: which one; not `sampled`.
    """

    options: DivergenceConfig

    def __call__(
        self,
        student: Float[Tensor, "R P"],
        teacher: Float[Tensor, "R P"],
        sampled: Int64[Tensor, " R"],
        shards: VocabularyShards = WHOLE,
    ) -> Float[Tensor, " R"]:
        """The divergence at each position, nats, differentiable in the student's logits.

        Args:
            student: logits over the temperature, -inf for ids that mean nothing.
            teacher: the same ids; no gradient flows into them.
            sampled: the ids that the student sampled at these positions.
            shards: how to reach the columns of other ranks.
        """
        own, theirs = log_softmax(student, shards), log_softmax(teacher.detach(), shards)
        match self.options.kind:
            case DivergenceKind.reverse_kl:
                return reverse_kl(own, theirs, shards)
            case DivergenceKind.forward_kl:
                return forward_kl(own, theirs, shards)
            case DivergenceKind.jsd:
                return jsd(own, theirs, self.options.beta, shards)
            case DivergenceKind.topk_reverse_kl:
                ids = shards.top(own, self.options.top_k)
                return reverse_kl(with_tail(shards.at(own, ids)), with_tail(shards.at(theirs, ids)))
            case DivergenceKind.topk_forward_kl:
                ids = shards.top(theirs, self.options.top_k)
                return forward_kl(with_tail(shards.at(own, ids)), with_tail(shards.at(theirs, ids)))
            case DivergenceKind.student_topk_sampled_tail:
                ids, chosen = shards.top(own, self.options.top_k), sampled.unsqueeze(-1)
                return student_topk_sampled_tail(
                    shards.at(own, ids),
                    shards.at(theirs, ids),
                    shards.at(own, chosen).squeeze(-1),
                    shards.at(theirs, chosen).squeeze(-1),
                    (ids == chosen).any(-1),
                )
            case DivergenceKind.sampled:
                raise AssertionError("the term of the sampled token is part of the advantage")
