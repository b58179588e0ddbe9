"""Correction of the mismatch between the engine that sampled and the trainer that learns.

T = tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer.loss.config import Correction, LossConfig


def correction_weight(
    options: LossConfig, old: Float[Tensor, " T"], rollout: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """Factor on the policy loss of each token, without gradient.

    With w = exp(old - rollout): `tis` gives clamp(w, low, high) (Yao et al., "Your efficient RL framework secretly
    brings you off-policy RL training", 2025); `icepop` gives w inside [low, high] and 0 outside (arXiv 2510.18855).
    """
    w = torch.exp(old.detach() - rollout)
    low, high = options.correction_low, options.correction_high
    match options.correction:
        case None | Correction.none:
            return torch.ones_like(w)
        case Correction.tis:
            return w.clamp(low, high)
        case Correction.icepop:
            return torch.where((w >= low) & (w <= high), w, 0.0)
