"""Divergences against plain sums, hand-computed values, gradients, padding, and shards of a vocabulary."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributed

from opd_trainer.divergence.kl import forward_kl, jsd, reverse_kl
from opd_trainer.divergence.softmax import log_softmax
from opd_trainer.divergence.topk import student_topk_sampled_tail, with_tail
from opd_trainer.vocabulary import VocabularyShards
from tests.gloo import run_gloo

V = 8
Divergence = Callable[[Tensor, Tensor, VocabularyShards], Tensor]


def half(student: Tensor, teacher: Tensor, shards: VocabularyShards) -> Tensor:
    return jsd(student, teacher, 0.5, shards)


DIVERGENCES: dict[str, Divergence] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": half}


def logits(seed: int, positions: int = 3) -> Tensor:
    return torch.randn(positions, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_golden() -> None:
    # p = (1/2, 1/2), t = (1/4, 3/4). Reverse: 1/2 log 2 + 1/2 log(2/3) = 0.1438410.
    # Forward: 1/4 log(1/2) + 3/4 log(3/2) = 0.1308120. JSD(1/2), m = (3/8, 5/8):
    # 1/2 (1/4 log(2/3) + 3/4 log(6/5)) + 1/2 (1/2 log(4/3) + 1/2 log(4/5)) = (0.0353749 + 0.0322693) / 2 = 0.0338221.
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert float(reverse_kl(student, teacher)) == pytest.approx(0.1438410, abs=1e-7)
    assert float(forward_kl(student, teacher)) == pytest.approx(0.1308120, abs=1e-7)
    assert float(jsd(student, teacher, 0.5)) == pytest.approx(0.0338221, abs=1e-7)


def test_log_softmax_is_torch_s() -> None:
    torch.testing.assert_close(log_softmax(logits(0)), torch.log_softmax(logits(0), -1))


def test_jsd_meets_both_kls_at_its_ends() -> None:
    student, teacher = log_softmax(logits(0)), log_softmax(logits(1))
    assert torch.equal(jsd(student, teacher, 0.0), forward_kl(student, teacher))
    assert torch.equal(jsd(student, teacher, 1.0), reverse_kl(student, teacher))
    small = 1e-6
    torch.testing.assert_close(jsd(student, teacher, small) / small, forward_kl(student, teacher), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        jsd(student, teacher, 1 - small) / small, reverse_kl(student, teacher), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_for_equals_and_gradients_agree_with_finite_differences(name: str) -> None:
    divergence = DIVERGENCES[name]
    same = log_softmax(logits(0))
    torch.testing.assert_close(divergence(same, same, VocabularyShards()), torch.zeros(3, dtype=torch.float64))
    teacher = log_softmax(logits(1))
    assert torch.autograd.gradcheck(
        lambda x: divergence(log_softmax(x), teacher, VocabularyShards()), (logits(0).requires_grad_(),)
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_ids_change_neither_value_nor_gradient(name: str) -> None:
    divergence = DIVERGENCES[name]

    def value_and_gradient(pad: int) -> tuple[Tensor, Tensor]:
        minus_inf = torch.full((3, pad), -math.inf, dtype=torch.float64)
        student = torch.cat([logits(0), minus_inf], -1).requires_grad_()
        teacher = log_softmax(torch.cat([logits(1), minus_inf], -1))
        value = divergence(log_softmax(student), teacher, VocabularyShards())
        [gradient] = torch.autograd.grad(value.sum(), student)
        return value.detach(), gradient

    value, gradient = value_and_gradient(0)
    padded_value, padded_gradient = value_and_gradient(2)
    torch.testing.assert_close(padded_value, value)
    torch.testing.assert_close(padded_gradient[:, :V], gradient)
    assert not bool(padded_gradient[:, V:].any())


def test_a_token_that_the_teacher_excludes() -> None:
    student = log_softmax(torch.zeros(1, 2))
    teacher = torch.tensor([[0.0, -math.inf]])
    assert float(reverse_kl(student, teacher)) == math.inf
    assert float(forward_kl(student, teacher)) == pytest.approx(math.log(2))
    # m = (3/4, 1/4): 1/2 log(4/3) + 1/2 (1/2 log(2/3) + 1/2 log 2).
    expected = 0.5 * math.log(4 / 3) + 0.25 * (math.log(2 / 3) + math.log(2))
    assert float(jsd(student, teacher, 0.5)) == pytest.approx(expected)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        summed = x.clone()
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        distributed.all_reduce(summed)
        return summed


def _largest(x: Tensor) -> Tensor:
    highest = x.clone()
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    return highest


def on_shards(rank: int, world_size: int, rendezvous: str) -> dict[str, tuple[list[float], list[list[float]]]]:
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        shards = VocabularyShards(total=_Total.apply, copy=_Copy.apply, largest=_largest)
        part = slice(rank * V // world_size, (rank + 1) * V // world_size)
        found = {}
        for name, divergence in DIVERGENCES.items():
            student = logits(0)[:, part].clone().requires_grad_()
            teacher = log_softmax(logits(1)[:, part], shards)
            value = divergence(log_softmax(student, shards), teacher, shards)
            [gradient] = torch.autograd.grad(value.sum(), student)
            found[name] = (value.tolist(), gradient.tolist())
        return found
    finally:
        distributed.destroy_process_group()


def test_a_vocabulary_on_two_ranks_equals_one() -> None:
    by_rank = run_gloo(on_shards, 2)
    for name, divergence in DIVERGENCES.items():
        student = logits(0).requires_grad_()
        value = divergence(log_softmax(student), log_softmax(logits(1)), VocabularyShards())
        [gradient] = torch.autograd.grad(value.sum(), student)
        for found in by_rank:
            torch.testing.assert_close(torch.tensor(found[name][0], dtype=torch.float64), value.detach())
        sharded = torch.cat([torch.tensor(found[name][1], dtype=torch.float64) for found in by_rank], -1)
        torch.testing.assert_close(sharded, gradient)


def test_tail_golden() -> None:
    # Candidates 1/2 and 1/4 leave 1/4.
    found = with_tail(torch.tensor([[0.5, 0.25]]).log())
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.25, 0.25]]).log())


@pytest.mark.parametrize("beyond", [0.0, 1e-6], ids=["one", "rounded beyond one"])
def test_an_empty_tail_stays_finite(beyond: float) -> None:
    log_probs = torch.tensor([[beyond, -40.0]]).requires_grad_()
    value = reverse_kl(with_tail(log_probs), with_tail(torch.tensor([[0.5, 0.4]]).log()))
    value.sum().backward()
    assert bool(torch.isfinite(value).all())
    assert log_probs.grad is not None
    assert bool(torch.isfinite(log_probs.grad).all())


def test_coarse_graining_never_exceeds_the_full_divergence() -> None:
    student, teacher = log_softmax(logits(0, 50)), log_softmax(logits(1, 50))
    for k in (1, 3, V - 1):
        candidates = student.topk(k).indices
        coarse = reverse_kl(with_tail(student.gather(-1, candidates)), with_tail(teacher.gather(-1, candidates)))
        assert bool((coarse >= -1e-12).all())
        assert bool((coarse <= reverse_kl(student, teacher) + 1e-12).all())
    torch.testing.assert_close(coarse, reverse_kl(student, teacher))


def test_student_topk_sampled_tail_golden() -> None:
    # One candidate, p = 1/2, t = 1/4: 1/2 log 2. Sampled outside with s = log 1/4, t = log 1/2:
    # (log(1/2) + 1) * log(1/4). Inside: nothing more.
    student, teacher = torch.tensor([[0.5], [0.5]]).log(), torch.tensor([[0.25], [0.25]]).log()
    sampled, known = torch.tensor([0.25, 0.5]).log(), torch.tensor([0.5, 0.25]).log()
    found = student_topk_sampled_tail(student, teacher, sampled, known, torch.tensor([False, True]))
    inside = 0.5 * math.log(2)
    expected = torch.tensor([inside + (1 - math.log(2)) * math.log(0.25), inside])
    torch.testing.assert_close(found, expected)
