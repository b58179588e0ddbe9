"""GSPO: the ratio of whole sequences, with a gradient for each token.

T = tokens, N = sequences. arXiv 2507.18071, eq. 13-14 (GSPO-token). A broadcast advantage reproduces plain GSPO
(eq. 5-7); a per-token OPD term keeps its own gradient, where the plain sequence ratio would spread each token's term
over the others.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd_trainer import jagged
from opd_trainer.loss.clip import clipped_surrogate, outside_trust_region
from opd_trainer.loss.policy import PolicyLoss, ratio
from opd_trainer.types import TokenBatch


@dataclass(slots=True)
class GspoLoss(PolicyLoss):
    """The clipped surrogate with q_t = exp(sg(mean over the sequence of (s - o)) + s_t - sg(s_t)).

    Needs whole sequences in a micro-batch.
    """

    eps_low: float = 3e-4
    """How far the sequence ratio may fall below 1 (GSPO, section 5.1)."""
    eps_high: float = 4e-4
    """How far the sequence ratio may rise above 1 (GSPO, section 5.1)."""

    def __call__(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Float[Tensor, " T"]:
        """See the class."""
        return clipped_surrogate(self._ratio(log_probs, old, batch), advantage, self.eps_low, self.eps_high)

    def clipped(
        self,
        log_probs: Float[Tensor, " T"],
        old: Float[Tensor, " T"],
        advantage: Float[Tensor, " T"],
        batch: TokenBatch,
    ) -> Bool[Tensor, " T"]:
        """Where the gradient is cut."""
        return outside_trust_region(self._ratio(log_probs, old, batch), advantage, self.eps_low, self.eps_high)

    def _ratio(
        self, log_probs: Float[Tensor, " T"], old: Float[Tensor, " T"], batch: TokenBatch
    ) -> Float[Tensor, " T"]:
        live = log_probs.detach()
        mean = jagged.mean_by(live - old, batch.seq, batch.mask, batch.num_sequences)
        return mean.exp()[batch.seq] * ratio(log_probs, live)
