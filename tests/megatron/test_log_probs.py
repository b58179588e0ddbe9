import pytest
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from opd_trainer.megatron.log_probs import token_log_probs
from tests.gloo import run_gloo

M, V, PADDED = 11, 7, 8


def draw(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(M, PADDED, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(0, V, (M,), generator=generator)


def dense(logits, targets, temperature):
    log_p = (logits[:, :V] / temperature).log_softmax(1)
    entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def ours(logits, targets, temperature=1.0, chunk_tokens=4, **options):
    return token_log_probs(logits, targets, temperature=temperature, vocab_size=V, chunk_tokens=chunk_tokens, **options)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
def test_equals_log_softmax_in_double(temperature, chunk_tokens):
    logits, targets = draw()
    log_probs, entropy = ours(logits, targets, temperature, chunk_tokens)
    want_log_probs, want_entropy = dense(logits, targets, temperature)
    assert torch.allclose(log_probs, want_log_probs, rtol=0, atol=1e-13)
    assert torch.allclose(entropy, want_entropy, rtol=0, atol=1e-13)


def test_gradcheck():
    logits, targets = draw()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ours(z, targets, 0.7, entropy_gradient=True), logits)
    assert torch.autograd.gradcheck(lambda z: ours(z, targets, 0.7)[0], logits)


def test_entropy_has_a_gradient_only_on_request():
    logits, targets = draw()
    logits.requires_grad_()
    assert not ours(logits, targets)[1].requires_grad
    assert ours(logits, targets, entropy_gradient=True)[1].requires_grad


def test_padding_takes_no_probability_and_no_gradient():
    logits, targets = draw()
    logits[:, V:] = 1e4
    logits.requires_grad_()
    log_probs, entropy = ours(logits, targets, entropy_gradient=True)
    assert torch.allclose(log_probs, dense(logits, targets, 1.0)[0])
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert (logits.grad[:, V:] == 0).all()


def test_results_are_in_single_precision_for_half_precision_logits():
    logits, targets = draw(torch.bfloat16)
    logits.requires_grad_()
    log_probs, entropy = ours(logits, targets)
    assert log_probs.dtype == entropy.dtype == torch.float32
    assert torch.allclose(log_probs, dense(logits.float(), targets, 1.0)[0], atol=1e-6)
    log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_no_copy_of_the_logits_in_single_precision():
    class Allocations(TorchDispatchMode):
        """The largest fp32 tensor that any operation gives."""

        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                    self.largest = max(self.largest, tensor.numel())
            return out

    logits = torch.randn(64, 100).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 100, (64,))
    with Allocations() as seen:
        log_probs, entropy = token_log_probs(
            logits, targets, temperature=1.0, vocab_size=100, chunk_tokens=8, entropy_gradient=True
        )
        (log_probs.sum() + entropy.sum()).backward()
    assert 0 < seen.largest <= 8 * 100


def test_minus_infinity_is_a_token_of_probability_zero():
    logits, targets = draw(torch.float32)
    logits[:, 2] = -torch.inf
    targets[:] = 3
    logits.requires_grad_()
    log_probs, entropy = ours(logits, targets, entropy_gradient=True)
    want = dense(logits, targets, 1.0)
    assert torch.allclose(log_probs, want[0])
    assert torch.allclose(entropy, want[1])
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 2] == 0).all()


def test_target_of_probability_zero():
    logits, targets = draw(torch.float32)
    logits[5, 2] = -torch.inf
    targets[5] = 2
    log_probs, _ = ours(logits, targets)
    assert log_probs[5] == -torch.inf
    assert log_probs.isfinite().sum() == M - 1


def test_nan_stays_in_its_own_position():
    logits, targets = draw(torch.float32)
    logits[5, 2] = torch.nan
    log_probs, entropy = ours(logits, targets)
    assert log_probs.isnan().tolist() == entropy.isnan().tolist() == [row == 5 for row in range(M)]


def test_large_logits_do_not_overflow():
    logits, targets = draw(torch.float32)
    log_probs, entropy = ours(logits + 1e4, targets)
    assert log_probs.isfinite().all()
    assert entropy.isfinite().all()


def test_no_positions():
    logits = torch.zeros(0, PADDED, requires_grad=True)
    log_probs, entropy = ours(logits, torch.zeros(0, dtype=torch.int64))
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert logits.grad is not None


def vocabulary_parallel(rank, world_size, rendezvous):
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    logits, targets = draw()
    logits[:, 6] = -torch.inf
    targets.clamp_(max=5)
    mine = logits.chunk(world_size, dim=1)[rank].clone().requires_grad_()
    log_probs, entropy = ours(mine, targets, 0.7, tp_group=distributed.group.WORLD, entropy_gradient=True)
    (log_probs.sum() + (entropy * torch.arange(M)).sum()).backward()
    distributed.destroy_process_group()
    assert mine.grad is not None
    return log_probs.detach().numpy(), entropy.detach().numpy(), mine.grad.numpy()


@pytest.mark.parametrize("world_size", [2, 4])
def test_vocabulary_parallel_equals_dense(world_size):
    """With four ranks the last one has one column that counts, and that one is -inf, beside one of padding."""
    logits, targets = draw()
    logits[:, 6] = -torch.inf
    targets.clamp_(max=5)
    logits.requires_grad_()
    log_probs, entropy = ours(logits, targets, 0.7, entropy_gradient=True)
    (log_probs.sum() + (entropy * torch.arange(M)).sum()).backward()
    results = run_gloo(vocabulary_parallel, world_size)
    assert logits.grad is not None
    for got_log_probs, got_entropy, _ in results:
        assert torch.allclose(torch.from_numpy(got_log_probs), log_probs, rtol=0, atol=1e-13)
        assert torch.allclose(torch.from_numpy(got_entropy), entropy, rtol=0, atol=1e-13)
    grad = torch.cat([torch.from_numpy(result[2]) for result in results], dim=1)
    assert torch.allclose(grad, logits.grad, rtol=0, atol=1e-13)


def test_a_loss_about_other_things_passes_no_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, torch.inf]], requires_grad=True)
    log_probs, _ = token_log_probs(logits, torch.tensor([0, 1]), temperature=1.0, vocab_size=2, chunk_tokens=8)
    torch.where(torch.tensor([False, False]), log_probs, 1.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]
