"""What only a GPU runs, against the same on a CPU; skipped without one."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from opd_trainer.loss.nll import NegativeLogLikelihood
from opd_trainer.megatron.attention import Packed, padded_attention, plan_blocks, varlen_attention
from opd_trainer.model.config import Dtype, ModelConfig
from opd_trainer.rollout.config import EmbeddedRollout
from opd_trainer.rollout.embedded.worker import EmbeddedSpec, EmbeddedWorker
from opd_trainer.teacher.config import OffloadTeacher, ResidentTeacher, SwapTeacher, TeacherConfig
from opd_trainer.teacher.inline import inline_teacher
from opd_trainer.types import TokenBatch
from tests.megatron import training
from tests.rollout.models import (
    CONFIGS,
    EOS,
    Words,
    by_request,
    finish,
    random_model,
    reference_log_probs,
    requests,
    sampling,
    tensors,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_flash_attention_equals_padded_attention_with_gradients(key_heads: int):
    torch.manual_seed(0)
    lengths = torch.tensor([5, 1, 130, 64, 17])
    total = int(lengths.sum())
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    plan = plan_blocks(lengths, lengths, CUDA)
    starts = zip(plan.query_starts.tolist(), lengths.tolist(), strict=True)
    slots = torch.cat([start + torch.arange(length) for start, length in starts]).to(CUDA)
    packed = Packed(slots, slots, bounds.int().to(CUDA), int(lengths.max()), slots)
    inputs = [
        torch.randn(total, heads, 32, device=CUDA).bfloat16().requires_grad_() for heads in (4, key_heads, key_heads)
    ]
    weight = torch.randn(total, 4, 32, device=CUDA)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = padded_attention(*exact, blocks=plan.blocks, query_slots=slots, key_slots=slots, scale=None)
    found = varlen_attention(*inputs, packed=packed, scale=None)
    grads = torch.autograd.grad((found.float() * weight).sum(), inputs)
    pairs = zip((found, *grads), (expected, *torch.autograd.grad((expected * weight).sum(), exact)), strict=True)
    for ours, theirs in pairs:
        assert (ours.float() - theirs).norm() / theirs.norm() < 1e-2


def log_probs_by_transformers(folder: Path, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probs of all tokens but first ones, and the norm of the gradient of sum(-weight * log-prob)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for tokens in batch.tokens.split(batch.lengths.tolist()):
        log_p = model(tokens[None]).logits[0].log_softmax(-1)
        found += [torch.zeros(1), log_p[:-1].gather(1, tokens[1:, None])[:, 0]]
    log_probs = torch.cat(found)
    assert batch.weight is not None
    (-log_probs * batch.weight).sum().backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return log_probs.detach(), torch.stack(norms).norm()


@pytest.mark.parametrize("dtype", Dtype)
def test_an_update_equals_that_of_transformers(tmp_path: Path, dtype: Dtype):
    folder, batch = training.write_model(tmp_path), training.batch()
    expected, norm = log_probs_by_transformers(folder, batch)
    spec = training.spec(folder, model=ModelConfig(load=str(folder), dtype=dtype))
    with training.started(spec) as worker:
        first = worker.update([batch], NegativeLogLikelihood())
        losses = [worker.update([batch], NegativeLogLikelihood()).loss for _ in range(10)]
    tolerance = 1e-3 if dtype is Dtype.float32 else 5e-2
    gap = (first.log_probs[0] - expected)[batch.mask].abs()
    assert gap.mean() < tolerance
    assert first.grad_norm == pytest.approx(float(norm), rel=2 * tolerance)
    assert losses[-1] < 0.5 * first.loss
    assert first.peak_memory_bytes > 0


@pytest.mark.parametrize("dtype", Dtype)
def test_every_placement_gives_the_same_scores(tmp_path: Path, dtype: Dtype):
    student, other = (training.write_model(tmp_path / name, seed=seed) for seed, name in enumerate(("s", "t")))
    batch, found = training.batch(), []
    for kind in (ResidentTeacher, OffloadTeacher, SwapTeacher):
        teacher: TeacherConfig = kind(load=str(other))
        model = ModelConfig(load=str(student), dtype=dtype)
        plain = training.spec(student, model=model)
        built = inline_teacher("default", teacher, plain.model, plain.megatron, 1.0)
        with training.started(dataclasses.replace(plain, teachers={"default": built})) as worker:
            before = training.weights(worker)
            found.append(worker.score([batch], "teacher")[0])
            after = training.weights(worker)
            assert all(torch.equal(before[name], after[name]) for name in before)
            updated = worker.update([batch], training.Distill())
            assert updated.teacher is not None
            assert torch.equal(updated.teacher[0][batch.mask], found[-1][batch.mask])
    assert all(torch.equal(scores[batch.mask], found[0][batch.mask]) for scores in found)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dtype", Dtype)
def test_training_goes_on_from_a_checkpoint(tmp_path: Path, dtype: Dtype, background: bool):
    folder, batch = training.write_model(tmp_path / "model"), training.batch()
    spec = training.spec(folder, model=ModelConfig(load=str(folder), dtype=dtype))
    saved = tmp_path / "saved"
    saved.mkdir()
    with training.started(spec) as worker:
        for _ in range(2):
            worker.update([batch], NegativeLogLikelihood())
        worker.save(saved, background)
        worker.finish_save()
        worker.update([batch], NegativeLogLikelihood())
        expected = training.weights(worker)
    with training.started(spec) as worker:
        worker.restore(saved)
        worker.update([batch], NegativeLogLikelihood())
        found = training.weights(worker)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_embedded_engine_decodes_as_transformers_computes(name: str, graphs: bool):
    model, asked = random_model(CONFIGS[name]), requests(prompts=9, siblings=3)
    rollout = EmbeddedRollout(batch_size=10, cuda_graphs=graphs)
    worker = EmbeddedWorker(EmbeddedSpec(model.config, Words(), (EOS,), rollout, torch.float32, "cuda"))
    worker.start()
    worker.load_bucket(tensors(model))
    worker.commit(1)
    how = sampling(max_response_tokens=60, temperature=0.8, log_prob_top_k=2)
    for _ in range(2):
        found = by_request(finish(worker, asked, how))
        assert len(found) == 27
        for sample in found.values():
            torch.testing.assert_close(sample.log_probs, reference_log_probs(model, sample, 0.8), atol=1e-3, rtol=0)
        assert len({len(sample.response) for sample in found.values()}) > 2
    captured = sum(graph is not None for steps in worker._steps.values() for graph in steps._graphs.values())
    assert (captured > 0) == (graphs and model.config.model_type != "qwen3_moe")
