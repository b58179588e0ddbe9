"""The kernel of log-probs against the same in fp64 and chunks, on a GPU or in Triton's interpreter.

Run: TRITON_INTERPRET=1 python -m tests.megatron.kernel_cases
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from opd_trainer.megatron import log_probs
from opd_trainer.megatron.log_probs import VocabularyShard, token_log_probs

Case = Callable[[torch.device], None]
Op = ReduceOp.RedOpType
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(rows: int, columns: int, vocab_size: int, device: torch.device) -> list[Tensor]:
    """Logits f64, targets, and gradients of log-probs and of the entropy."""
    generator = torch.Generator().manual_seed(rows * columns)
    logits = 4 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (rows,), generator=generator)
    upstream = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    return [tensor.to(device) for tensor in (logits, targets, *upstream)]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to rounding: of fp32 sums, and of a result in `dtype`, which Triton's interpreter cuts off."""
    bits = {torch.float32: 17, torch.bfloat16: 8, torch.float16: 11}[dtype] - (not found.is_cuda)
    rtol, atol = 2.0**-bits + 1e-5, 2e-6
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


def agree(logits: Tensor, case: tuple[Tensor, ...], vocab_size: int, temperature: float, entropy: bool = True) -> None:
    """Values and gradients of the kernel and of the path in fp64."""
    targets, *upstream = case
    leaves = [logits.detach().requires_grad_(), logits.detach().double().requires_grad_()]
    results = []
    for leaf in leaves:
        found = token_log_probs(
            leaf,
            targets,
            temperature=temperature,
            vocab_size=vocab_size,
            chunk_tokens=16,
            entropy_gradient=entropy,
        )
        grads = [grad.to(values.dtype) for grad, values in zip(upstream, found, strict=True)]
        torch.autograd.backward(found if entropy else found[:1], grads if entropy else grads[:1])
        assert leaf.grad is not None
        results.append((*found, leaf.grad))
    for found, expected in zip(results[0][:2], results[1][:2], strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-6, equal_nan=True)
    assert results[0][2].dtype == logits.dtype
    close(results[0][2], results[1][2], logits.dtype)


def sizes(device: torch.device) -> None:
    for rows, columns, vocab_size in ((1, 1, 1), (3, 7, 6), (5, 4096, 4096), (2, 4097, 4097), (9, 9001, 8999)):
        logits, *case = draw(rows, columns, vocab_size, device)
        for dtype in DTYPES:
            agree(logits.to(dtype), tuple(case), vocab_size, 1.0)


def temperatures(device: torch.device) -> None:
    logits, *case = draw(6, 5000, 4500, device)
    for temperature in (0.6, 1.7):
        for entropy in (False, True):
            agree(logits.float(), tuple(case), 4500, temperature, entropy)


def padding_means_nothing(device: torch.device) -> None:
    logits, *case = draw(4, 5000, 4990, device)
    logits[:, 4990:] = torch.tensor([torch.nan, torch.inf, 1e4, -torch.inf, 0.0] * 2, dtype=torch.float64)
    agree(logits.float(), tuple(case), 4990, 1.0)


def no_position_and_no_column(device: torch.device) -> None:
    for rows, vocab_size in ((0, 7), (4, 0)):
        logits = torch.zeros(rows, 7, device=device, requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.int64, device=device)
        found, _ = token_log_probs(logits, targets, temperature=1.0, vocab_size=vocab_size, chunk_tokens=4)
        assert found.shape == (rows,)
        found.sum().backward()
        assert logits.grad is not None
        assert not logits.grad.any()


def infinities_and_nan(device: torch.device) -> None:
    logits, targets, *upstream = draw(12, 9000, 9000, device)
    logits[0, :4096] = -torch.inf  # a first block of nothing
    logits[1] = -torch.inf
    logits[1, 7000] = 0.0
    logits[2] = -torch.inf  # no distribution: NaN
    logits[3, 8000] = torch.nan
    logits[4, 17] = torch.inf
    logits[5, :8000] = torch.finfo(torch.float32).min  # a mask that is no infinity
    logits[6, targets[6]] = -torch.inf
    logits[7, :8999] = 3e4
    targets[0], targets[1], targets[5] = 5000, 7000, 8500
    case = (targets, *upstream)
    agree(logits.float(), case, 9000, 1.0)
    found, _ = token_log_probs(logits.float(), targets, temperature=1.0, vocab_size=9000, chunk_tokens=16)
    assert found.isnan().tolist() == [row in (2, 3, 4) for row in range(12)]
    assert found[6] == -torch.inf


def other_strides(device: torch.device) -> None:
    logits, *case = draw(6, 6000, 5000, device)
    wide, turned = logits.float()[:, :5000], logits.float()[:, :5000].t().contiguous().t()
    row = logits.float()[:1, :5000].expand(6, -1)
    for other in (wide, turned, row):
        agree(other, tuple(case), 5000, 1.0)


class _Reductions:
    """What a rank asks to be reduced; answered as far as the totals are known."""

    def __init__(self, totals: list[Tensor]) -> None:
        self.calls: list[tuple[Tensor, Op]] = []
        self._totals = totals

    def __call__(self, tensor: Tensor, op: Op) -> Tensor:
        number = len(self.calls)
        self.calls.append((tensor.clone(), op))
        return self._totals[number].clone() if number < len(self._totals) else tensor


def _reduced(calls: tuple[tuple[Tensor, Op], ...]) -> Tensor:
    parts = torch.stack([tensor for tensor, _ in calls])
    return parts.amax(0) if calls[0][1] == ReduceOp.MAX else parts.sum(0)


def _one_rank(number: int, part: Tensor, case: list[Tensor], reductions: _Reductions) -> tuple[Tensor, ...]:
    """Log-probs, entropy, and the gradient of this rank's columns."""
    targets, *upstream = case
    leaf, width = part.clone().requires_grad_(), part.shape[1]
    shard = VocabularyShard(width * number, max(0, min(width, 3000 - width * number)), reductions)
    found = log_probs._TokenLogProbs.apply(leaf, targets, 0.7, 16, shard, True)
    torch.autograd.backward(found, [grad.float() for grad in upstream])
    assert leaf.grad is not None
    return *found, leaf.grad


def shards_of_a_vocabulary(device: torch.device) -> None:
    """Ranks one after the other: what they reduce is collected in one round and given to them in the next."""
    logits, *case = draw(8, 4 * 1300, 3000, device)  # the third is partly padding, the fourth wholly
    targets, *upstream = case
    logits = logits.float()
    logits[0, :1300] = -torch.inf
    logits[1, 1300:2600] = torch.finfo(torch.float32).min / 2
    targets[0], targets[1] = 1300, 0
    totals: list[Tensor] = []
    ranks: list[tuple[Tensor, ...]] = []
    for _ in range(3):
        asked = [_Reductions(totals) for _ in range(4)]
        ranks = [_one_rank(number, part, case, asked[number]) for number, part in enumerate(logits.chunk(4, dim=1))]
        totals = [_reduced(calls) for calls in zip(*(one.calls for one in asked), strict=True)]
    whole = logits.double().requires_grad_()
    expected = token_log_probs(whole, targets, temperature=0.7, vocab_size=3000, chunk_tokens=16, entropy_gradient=True)
    torch.autograd.backward(expected, upstream)
    assert whole.grad is not None
    for log_p, entropy, _ in ranks:
        torch.testing.assert_close(log_p.double(), expected[0], atol=2e-5, rtol=1e-6)
        torch.testing.assert_close(entropy.double(), expected[1], atol=2e-5, rtol=1e-6)
    close(torch.cat([grad for _, _, grad in ranks], dim=1), whole.grad, torch.float32)


CASES: tuple[Case, ...] = (
    sizes,
    temperatures,
    padding_means_nothing,
    no_position_and_no_column,
    infinities_and_nan,
    other_strides,
    shards_of_a_vocabulary,
)


def main() -> None:
    """All of them on a CPU."""
    with patch.object(log_probs, "_has_kernel", lambda logits: logits.dtype != torch.float64):
        for case in CASES:
            case(torch.device("cpu"))
            print(case.__name__, flush=True)


if __name__ == "__main__":
    main()
