"""Per-token estimators of KL(student || reference) from the sampled tokens.

T = tokens. J. Schulman, "Approximating KL divergence", 2020.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from opd_trainer.loss.config import KlEstimator

LARGEST_EXPONENT = 20.0
"""exp(x) beyond it overflows nothing yet, and its gradient stays finite before the bound below cuts it."""
K3_BOUND = 10.0


def k1(x: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """x."""
    return x


def k2(x: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """x^2 / 2."""
    return x.square() / 2


def k3(x: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """exp(-x) - 1 + x, at most 10."""
    bounded = x.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return (torch.expm1(-bounded) + bounded).clamp(max=K3_BOUND)


def kl_estimate(
    estimator: KlEstimator, student: Float[Tensor, " T"], reference: Float[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """The chosen estimate, x = student - reference."""
    x = student - reference
    match estimator:
        case KlEstimator.k1:
            return k1(x)
        case KlEstimator.k2:
            return k2(x)
        case KlEstimator.k3:
            return k3(x)
