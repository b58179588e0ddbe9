import math

import pytest
import torch

from opd_trainer.rollout.embedded.sampling import draw, uniforms
from tests.rollout.models import sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0])
GRID = 20_000


def frequencies(**how: float | int) -> torch.Tensor:
    """Exact probabilities to 1 / GRID: uniforms on an even grid."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    drawn = draw(LOGITS.repeat(GRID, 1), sampling(**how), uniform)
    return torch.bincount(drawn.tokens, minlength=len(LOGITS)) / GRID


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax_at_the_temperature(temperature: float):
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(temperature=temperature), expected, atol=2 / GRID, rtol=0)


def test_top_k_keeps_the_k_likeliest():
    expected = torch.where(LOGITS >= 1.5, LOGITS, -math.inf).softmax(-1)
    torch.testing.assert_close(frequencies(top_k=2), expected, atol=2 / GRID, rtol=0)


def test_top_p_keeps_the_smallest_set_with_that_mass():
    # Softmax: 0.530, 0.321, 0.118, 0.026, 0.004 in falling order; the first two have 0.851.
    for top_p, kept in [(0.5, 1), (0.54, 2), (0.85, 2), (0.86, 3)]:
        threshold = LOGITS.sort(descending=True).values[kept - 1]
        expected = torch.where(threshold <= LOGITS, LOGITS, -math.inf).softmax(-1)
        torch.testing.assert_close(frequencies(top_p=top_p), expected, atol=2 / GRID, rtol=0)


def test_top_p_applies_to_what_top_k_left():
    # Of the two likeliest, renormalised, the first has 0.622.
    assert frequencies(top_k=2, top_p=0.62)[0] == 1.0
    assert frequencies(top_k=2, top_p=0.63)[3] > 0


@pytest.mark.parametrize("how", [{}, {"top_k": 1}, {"top_p": 0.1}, {"temperature": 0.7}])
def test_log_probs_are_those_of_the_whole_distribution(how: dict[str, float]):
    drawn = draw(LOGITS.repeat(3, 1), sampling(**how), torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64))
    torch.testing.assert_close(drawn.log_probs, (LOGITS / how.get("temperature", 1.0)).log_softmax(-1)[drawn.tokens])


def test_greedy_takes_the_likeliest_and_reports_temperature_one():
    drawn = draw(LOGITS.repeat(2, 1), sampling(temperature=0.0), torch.tensor([0.0, 0.99]).double())
    assert drawn.tokens.tolist() == [0, 0]
    torch.testing.assert_close(drawn.log_probs, LOGITS.log_softmax(-1)[drawn.tokens])


def test_the_ends_of_the_unit_interval_never_give_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).repeat(2, 1)
    drawn = draw(logits, sampling(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tokens.tolist() == [1, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_p": 0.9, "top_k": 3}])
def test_logits_that_are_not_finite_give_nan_in_their_row_only(bad: float, how: dict[str, float]):
    logits = LOGITS.repeat(2, 1)
    logits[0, 2] = bad
    drawn = draw(logits, sampling(**how), torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert drawn.log_probs.isnan().tolist() == [True, False]
    assert ((drawn.tokens >= 0) & (drawn.tokens < len(LOGITS))).all()


@pytest.mark.parametrize("size", [512, 513, 3000])
def test_a_large_vocabulary_is_searched_exactly(size: int):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50, size, generator=generator).repeat_interleave(40, 0)
    logits[:, ::3] = -math.inf
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    running = logits.double().softmax(-1).cumsum(-1)
    tokens = draw(logits, sampling(), uniform).tokens[:, None]
    below = torch.where(tokens > 0, running.gather(-1, (tokens - 1).clamp(min=0)), 0.0).squeeze(1)
    above = running.gather(-1, tokens).squeeze(1)
    assert (above > below).all(), "an impossible token was drawn"
    assert ((below - 1e-6 < uniform) & (uniform < above + 1e-6)).all()


def test_candidates_are_the_likeliest_of_the_whole_distribution():
    drawn = draw(LOGITS.repeat(2, 1), sampling(temperature=0.5, top_k=1, log_prob_top_k=3), torch.rand(2).double())
    assert drawn.topk_ids.tolist() == [[0, 3, 2]] * 2
    torch.testing.assert_close(drawn.topk_log_probs, (2 * LOGITS).log_softmax(-1)[drawn.topk_ids])


def test_uniforms_depend_on_their_seed_only():
    alone, together = uniforms([7], 5), uniforms([3, 7, 2**62 + 1], 9)
    torch.testing.assert_close(alone[0], together[1, :5], atol=0, rtol=0)
    assert len(together.unique()) == together.numel()
    assert ((together >= 0) & (together < 1)).all()
