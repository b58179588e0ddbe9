"""Which distillation signals have which expected gradient: exact expectations over a small vocabulary.

The student samples y ~ p; a "surrogate" is a loss of the sampled token, with the expected gradient
sum_y sg(p_y) grad loss(y).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opd_trainer.divergence.kl import forward_kl, reverse_kl
from opd_trainer.divergence.softmax import log_softmax
from opd_trainer.divergence.topk import student_topk_sampled_tail, with_tail
from opd_trainer.loss.kl import k1, k2, k3

V = 8
SEEDS = range(40)
K = 3


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Student logits (a leaf) and the teacher's log-probs, [1, V]; every other pair is far apart."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.5 if seed % 2 else 2.0
    student, teacher = spread * torch.randn(2, 1, V, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), log_softmax(teacher)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0].flatten()


def expected_gradient(surrogate: Callable[[Tensor, Tensor], Tensor], seed: int) -> Tensor:
    """Of a surrogate of (s, t), both [V]: every token of the vocabulary, weighted with its probability."""
    logits, teacher = draw(seed)
    s = log_softmax(logits)[0]
    return gradient((s.exp().detach() * surrogate(s, teacher[0])).sum(), logits)


def true_gradient(divergence: Callable[[Tensor, Tensor], Tensor], seed: int) -> Tensor:
    logits, teacher = draw(seed)
    return gradient(divergence(log_softmax(logits), teacher).sum(), logits)


def policy_gradient(advantage: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, t: -advantage(s - t).detach() * s


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


EXACT = {
    "policy gradient with -k1": (policy_gradient(lambda x: -k1(x)), reverse_kl),
    "k2 backpropagated": (lambda s, t: k2(s - t), reverse_kl),
    # Without the bound that `k3` has for safety.
    "k3 backpropagated is the forward KL": (lambda s, t: torch.exp(t - s) - 1 + s - t, forward_kl),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_surrogates(name: str) -> None:
    surrogate, divergence = EXACT[name]
    for seed in SEEDS:
        found, expected = expected_gradient(surrogate, seed), true_gradient(divergence, seed)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_k1_backpropagated_teaches_nothing() -> None:
    for seed in SEEDS:
        assert float(expected_gradient(lambda s, t: k1(s - t), seed).abs().max()) < 1e-12


@pytest.mark.parametrize(("estimate", "mean"), [(k2, 0.5), (k3, 0.2)])
def test_k2_and_k3_as_advantages_point_elsewhere(estimate: Callable[[Tensor], Tensor], mean: float) -> None:
    surrogate = policy_gradient(lambda x: -estimate(x))
    cosines = [cosine(expected_gradient(surrogate, seed), true_gradient(reverse_kl, seed)) for seed in SEEDS]
    assert sum(cosines) / len(cosines) == pytest.approx(mean, abs=0.05)
    assert sum(found < 0 for found in cosines) > len(cosines) / 10


def test_a_detached_topk_scalar_as_advantage_teaches_nothing() -> None:
    """It does not depend on the sampled token, so it is a baseline."""
    for seed in SEEDS:
        logits, teacher = draw(seed)
        candidates = log_softmax(logits).topk(K).indices
        scalar = reverse_kl(
            with_tail(log_softmax(logits).gather(-1, candidates)), with_tail(teacher.gather(-1, candidates))
        ).detach()
        assert float(scalar) > 0
        found = expected_gradient(lambda s, t, scalar=scalar: scalar * s, seed)
        assert float(found.abs().max()) < 1e-12


def truncated(student: Tensor, teacher: Tensor) -> Tensor:
    """sum over the teacher's top k of p_t (log p_t - log p_s), without a tail."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def test_truncated_topk_is_no_divergence() -> None:
    negative = []
    for seed in SEEDS:
        logits, teacher = draw(seed)
        candidates = teacher.topk(K).indices
        student = log_softmax(logits).gather(-1, candidates)
        kept = teacher.gather(-1, candidates)
        value = truncated(student, kept)
        if float(value.detach()) < 0:
            negative.append(seed)
            # Clamping the negative values away takes the gradient with them.
            assert not bool(gradient(value.clamp_min(0).sum(), logits).any())
        assert float(forward_kl(with_tail(student), with_tail(kept)).detach()) >= 0
    assert negative


def test_renormalised_topk_can_point_the_wrong_way() -> None:
    """t = (0.4, 0.2, rest), p = (0.2, 0.06, rest): both candidates should rise, the first one more.

    Renormalised, t is (0.67, 0.33) and p (0.77, 0.23): the first candidate is pushed down.
    """
    logits = torch.tensor([[0.2, 0.06, *[0.74 / 6] * 6]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.4, 0.2, *[0.4 / 6] * 6]], dtype=torch.float64).log()
    wanted = gradient(forward_kl(log_softmax(logits), teacher).sum(), logits)
    renormalised = forward_kl(log_softmax(log_softmax(logits)[:, :2]), log_softmax(teacher[:, :2]))
    found = gradient(renormalised.sum(), logits)
    assert float(wanted[0]) < 0 < float(found[0])
    assert cosine(found, wanted) < 0
    with_a_tail = forward_kl(with_tail(log_softmax(logits)[:, :2]), with_tail(teacher[:, :2]))
    assert cosine(gradient(with_a_tail.sum(), logits), wanted) > 0.9


def test_bounded_k3_is_k3_up_to_its_bound() -> None:
    x = torch.linspace(-2.5, 9.0, 100, dtype=torch.float64)
    torch.testing.assert_close(k3(x), torch.exp(-x) - 1 + x)


@pytest.mark.parametrize("k", [1, K, V - 1])
def test_student_topk_with_sampled_tail_is_exact(k: int) -> None:
    for seed in SEEDS:
        logits, teacher = draw(seed)
        log_p = log_softmax(logits)
        candidates = log_p.topk(k).indices
        # One row for each token that may be sampled.
        rows = [x.gather(-1, candidates).expand(V, -1) for x in (log_p, teacher)]
        inside = torch.isin(torch.arange(V), candidates)
        loss = student_topk_sampled_tail(rows[0], rows[1], log_p[0], teacher[0], inside)
        found = gradient((log_p[0].exp().detach() * loss).sum(), logits)
        torch.testing.assert_close(found, true_gradient(reverse_kl, seed), rtol=1e-9, atol=1e-12)
