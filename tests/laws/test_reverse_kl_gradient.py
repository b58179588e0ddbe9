"""With base advantage 0 the expected gradient of every option is that of the reverse KL, by exact enumeration."""

import itertools

import pytest
import torch
from torch import Tensor

from opd_trainer.opd.config import OpdConfig, OpdType, StudentLogProb
from opd_trainer.types import TokenBatch
from opd_trainer.updates import Live
from tests.laws.options import ESTIMATORS, estimators, objective, scores

V = 5
LENGTH = 2
SEQUENCES = list(itertools.product(range(V), repeat=LENGTH))


def tree(seed: int) -> list[Tensor]:
    """Logits of an autoregressive model over two tokens: [1, V] for the first, [V, V] given the first."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(V**depth, V, generator=generator, dtype=torch.float64) for depth in range(LENGTH)]


def sequence_log_probs(model: list[Tensor]) -> Tensor:
    """[V^2 * 2]: log-probs of both tokens of every possible sequence, end to end."""
    first, second = (torch.log_softmax(logits, -1) for logits in model)
    return torch.stack([x for a, b in SEQUENCES for x in (first[0, a], second[a, b])])


def reverse_kl_gradient(student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    """Gradient of sum over prefixes, reached with the student's own (fixed) probability, of KL(student || teacher)."""
    p, t = [torch.log_softmax(x, -1) for x in student], [torch.log_softmax(x, -1) for x in teacher]
    local = [(p[depth].exp() * (p[depth] - t[depth])).sum(-1) for depth in range(LENGTH)]
    total = local[0].sum() + (p[0][0].exp().detach() * local[1]).sum()
    return list(torch.autograd.grad(total, student))


@estimators
@pytest.mark.parametrize("student_log_prob", StudentLogProb)
def test_expected_gradient_is_that_of_the_reverse_kl(name: str, student_log_prob: StudentLogProb) -> None:
    student, teacher = [x.requires_grad_() for x in tree(0)], tree(1)
    log_probs = sequence_log_probs(student)
    num = len(SEQUENCES)
    batch = TokenBatch(
        tokens=torch.tensor(SEQUENCES).flatten(),
        seq=torch.repeat_interleave(torch.arange(num), LENGTH),
        mask=torch.ones(num * LENGTH, dtype=torch.bool),
        group=torch.zeros(num, dtype=torch.int64),
        reward=torch.rand(num),
        truncated=torch.zeros(num, dtype=torch.bool),
        teacher_name=("default",) * num,
        rollout=scores(log_probs.detach()),
        old=scores(log_probs.detach()),
        version=torch.zeros(num, dtype=torch.int64),
        teacher=scores(sequence_log_probs(teacher)),
        values=torch.zeros(num * LENGTH),
    )
    opd = OpdConfig(type=OpdType.megatron, only_reward=True, student_log_prob=student_log_prob)
    chosen = objective(ESTIMATORS[name], opd=opd)
    batch = chosen.assign(batch)
    # The expectation over rollouts: each sequence counts with its probability.
    probability = log_probs.detach().view(num, LENGTH).sum(1).exp()
    loss = chosen.loss()(Live(log_probs=log_probs, entropy=torch.zeros_like(log_probs)), batch)
    gradient = torch.autograd.grad((loss * probability[batch.seq]).sum(), student)
    for found, expected in zip(gradient, reverse_kl_gradient(student, teacher), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
