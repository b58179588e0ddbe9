import itertools
import math

import pytest

from opd_trainer.eval.statistics import estimate, pass_at_k


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_enumerated_probability(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([i < c for i in range(n)], k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_k_responses():
    with pytest.raises(ValueError, match="needs 3 responses"):
        pass_at_k(2, 1, 3)


def test_estimate_by_hand():
    # Mean 0.5; squared deviations 4 * 0.25 = 1, over 3, over 4, root.
    result = estimate([0, 1, 1, 0])
    assert (result.value, result.count) == (0.5, 4)
    assert result.standard_error == pytest.approx(math.sqrt(1 / 12))
    assert math.isnan(estimate([1.0]).standard_error)
    assert math.isnan(estimate([]).value)
