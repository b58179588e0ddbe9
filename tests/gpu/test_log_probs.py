"""The kernel of log-probs on a GPU; skipped without one."""

import pytest
import torch

from opd_trainer.megatron import log_probs
from opd_trainer.megatron.log_probs import token_log_probs
from tests.megatron.kernel_cases import CASES, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def test_it_is_used():
    assert log_probs._has_kernel(torch.empty(0, device=CUDA))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_equals_double_precision(case: Case):
    case(CUDA)


def test_rows_beyond_two_billion_logits():
    rows, columns = 16_500, 151_936
    logits = torch.empty(rows, columns, dtype=torch.bfloat16, device=CUDA).uniform_(-8, 8).requires_grad_()
    targets = torch.randint(0, columns, (rows,), device=CUDA)
    options = {"temperature": 1.0, "vocab_size": columns, "chunk_tokens": 16}
    found, _ = token_log_probs(logits, targets, **options)
    found.sum().backward()
    last = logits.detach()[-5:].double().requires_grad_()
    expected, _ = token_log_probs(last, targets[-5:], **options)
    expected.sum().backward()
    assert logits.grad is not None
    assert last.grad is not None
    torch.testing.assert_close(found[-5:].double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits.grad[-5:].double(), last.grad, atol=2e-6, rtol=2.0**-8)
