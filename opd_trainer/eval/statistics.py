"""Estimates over prompts, with their standard errors.

P = prompts, n = responses to one prompt, c = those that are correct.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        value: the mean; NaN without prompts.
        standard_error: sample standard deviation over prompts / sqrt(P); NaN for fewer than two prompts.
        count: P.
    """

    value: float
    standard_error: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of one number per prompt; prompts are the independent draws, their responses are not."""
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def pass_at_k(num_responses: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k responses, drawn without replacement from n, is correct.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of "Evaluating Large Language Models Trained on Code" (Chen et
    al., arXiv:2107.03374, equation 1).
    """
    if k > num_responses:
        raise ValueError(f"pass@{k} needs {k} responses, there are {num_responses}")
    return 1.0 - math.comb(num_responses - num_correct, k) / math.comb(num_responses, k)
