import importlib.util
import re

import pytest
import torch

from opd_trainer.errors import MissingExtra
from opd_trainer.megatron.attention import Packed
from opd_trainer.megatron.build import architecture_problems, build_model
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import unshard
from opd_trainer.megatron.huggingface import export_hf_weights
from opd_trainer.megatron.log_probs import token_log_probs
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import AttentionBackend, Dtype, Family, ModelConfig
from tests.gloo import run_gloo
from tests.megatron.models import VOCAB_SIZE, build, pack, sequences, started, tiny

TENSOR_CASES = [Family.qwen2, Family.qwen3]
PIPELINE_CASES = {"tied": {"tie_embeddings": True}, "untied": {"tie_embeddings": False}}


def microbatch() -> tuple[Packed, torch.Tensor]:
    packed = pack(sequences())
    return packed, packed.tokens.roll(-1)


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def step(model):
    """Log-probs and entropy of a micro-batch, after a backward pass through both."""
    packed, targets = microbatch()
    tp_group = model.runtime.tp_group
    log_probs, entropy = token_log_probs(
        model.forward(packed),
        targets,
        temperature=0.9,
        vocab_size=VOCAB_SIZE,
        chunk_tokens=16,
        tp_group=tp_group,
        entropy_gradient=True,
    )
    (log_probs.sum() + 0.1 * entropy.sum()).backward()
    return log_probs.detach().numpy(), entropy.detach().numpy()


def on_two_ranks(rank, world_size, rendezvous):
    """Every case in the same two processes, because starting them takes longer than the cases: {case: result}."""
    results = {}
    for case in [*TENSOR_CASES, *PIPELINE_CASES]:
        tensor = case in TENSOR_CASES
        settings = MegatronConfig(
            tensor_parallel=2 if tensor else 1, pipeline_parallel=1 if tensor else 2, timeout_s=300
        )
        runtime = MegatronRuntime(rank, world_size, f"{rendezvous}{case}", settings, 3)
        runtime.start()
        results[case] = (tensor_parallel if tensor else pipeline_parallel)(runtime, case)
        runtime.close()
    return results


@pytest.fixture(scope="module")
def two_ranks():
    return run_gloo(on_two_ranks, 2)


def tensor_parallel(runtime, family):
    model = build(runtime, tiny(family))
    log_probs, entropy = step(model)
    marks = {rule.megatron: getattr(p, "tensor_model_parallel", False) for rule, p in model.parameters()}
    assert marks == {rule.megatron: rule.shard_axis is not None for rule, _ in model.parameters()}
    grads = {rule.megatron: gradient(parameter).numpy() for rule, parameter in model.parameters()}
    weights = {name: tensor.numpy().copy() for name, tensor in export_hf_weights(model)}
    return log_probs, entropy, grads, weights


@pytest.mark.parametrize("family", TENSOR_CASES)
def test_tensor_parallel_equals_one_process(family, two_ranks, tmp_path):
    """The vocabulary of 53 is padded to 54 on two ranks."""
    results = [result[family] for result in two_ranks]
    with started(tmp_path, seed=3) as runtime:
        model = build(runtime, tiny(family))
        log_probs, entropy = step(model)
        weights = dict(export_hf_weights(model))
        for got_log_probs, got_entropy, _, got_weights in results:
            assert abs(got_log_probs - log_probs).max() < 1e-5
            assert abs(got_entropy - entropy).max() < 1e-5
            assert got_weights.keys() == weights.keys()
            assert all(torch.equal(torch.from_numpy(got_weights[name]), weights[name]) for name in weights)
        for rule, parameter in model.parameters():
            shards = [torch.from_numpy(result[2][rule.megatron]) for result in results]
            got = unshard(shards, rule.layout, model.architecture)
            want = unshard([gradient(parameter)], rule.layout, model.architecture)
            if rule.megatron.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                # Each rank has the part of its own heads; the optimizer step sums them over the ranks.
                got = (shards[0] + shards[1],)
            for ours, theirs in zip(got, want, strict=True):
                assert torch.allclose(ours, theirs, atol=1e-4), rule.megatron


def pipeline_parallel(runtime, case):
    """Runs both stages by hand: the first sends its hidden states, the second takes them."""
    model = build(runtime, tiny(Family.qwen3, **PIPELINE_CASES[case]), trainable=False)
    packed, _ = microbatch()
    if runtime.is_first_stage:
        hidden = model.forward(packed)
        torch.distributed.send(hidden, 1)
        logits = None
    else:
        hidden = torch.empty(len(packed.tokens), 1, model.architecture.hidden_size)
        torch.distributed.recv(hidden, 0)
        model.modules[0].set_input_tensor([hidden])
        logits = model.forward(packed).numpy()
    weights = {name: tensor.numpy().copy() for name, tensor in export_hf_weights(model)}
    return logits, weights


@pytest.mark.parametrize("case", PIPELINE_CASES)
def test_pipeline_parallel_equals_one_process(case, two_ranks, tmp_path):
    results = [result[case] for result in two_ranks]
    with started(tmp_path, seed=3) as runtime:
        model = build(runtime, tiny(Family.qwen3, **PIPELINE_CASES[case]), trainable=False)
        logits = model.forward(microbatch()[0])
        weights = dict(export_hf_weights(model))
    assert results[0][0] is None
    assert torch.allclose(torch.from_numpy(results[1][0]), logits, atol=1e-5)
    for _, got in results:
        assert list(got) == list(weights)
        assert all(torch.equal(torch.from_numpy(got[name]), weights[name]) for name in weights)


def test_initial_weights_depend_on_the_seed_alone(tmp_path):
    def weights(name, seed):
        (tmp_path / name).mkdir()
        with started(tmp_path / name, seed=seed) as runtime:
            torch.rand(3)
            return dict(export_hf_weights(build(runtime, tiny(Family.qwen3))))

    first, again, other = weights("a", 1), weights("b", 1), weights("c", 2)
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.1)
    assert first["model.layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(first[name], first["model.layers.0.mlp.up_proj.weight"])


def test_a_frozen_model_takes_no_gradient(tmp_path):
    with started(tmp_path) as runtime:
        model = build(runtime, tiny(Family.qwen3), trainable=False)
        logits = model.forward(microbatch()[0])
        assert not logits.requires_grad
        assert not model.modules[0].training
        assert not any(parameter.requires_grad for parameter in model.modules[0].parameters())
        assert build(runtime, tiny(Family.qwen3)).forward(microbatch()[0]).requires_grad


def test_two_models_side_by_side_keep_their_own_shapes(tmp_path):
    with started(tmp_path) as runtime:
        small = build(runtime, tiny(Family.qwen3))
        large = build(runtime, tiny(Family.qwen2, hidden_size=64, num_layers=3), trainable=False)
        packed = microbatch()[0]
        assert small.forward(packed).shape == large.forward(packed).shape
        assert small.modules[0].config.hidden_size == 32


def test_sixteen_bit(tmp_path):
    with started(tmp_path) as runtime:
        architecture = tiny(Family.qwen3)
        exact = build(runtime, architecture, trainable=False).forward(microbatch()[0])
        half = build_model(
            runtime, architecture, ModelConfig(dtype=Dtype.bfloat16), MegatronConfig(), trainable=False
        ).forward(microbatch()[0])
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.1 * exact.std()


def test_uneven_cuts_are_named():
    layout = MegatronConfig(tensor_parallel=3, pipeline_parallel=4)
    messages = [str(problem) for problem in architecture_problems(tiny(Family.qwen3), layout, trainable=True)]
    assert any("4 query heads" in message for message in messages)
    assert any("2 key/value heads" in message for message in messages)
    assert any("has 2 layers" in message for message in messages)
    assert not architecture_problems(tiny(Family.qwen3), MegatronConfig(tensor_parallel=2), trainable=True)


@pytest.mark.parametrize(
    ("family", "settings", "key", "message"),
    [
        (Family.qwen3, {"expert_parallel": 2}, "megatron.expert_parallel", "no experts to share"),
        (Family.qwen3, {"pipeline_parallel": 3}, "megatron.pipeline_parallel", "has 2 layers"),
        (
            Family.qwen3,
            {"pipeline_parallel": 2, "pipeline_layers": [1, 2]},
            "megatron.pipeline_layers",
            r"Set megatron.pipeline_layers=\[1,1\]",
        ),
        (Family.qwen3_moe, {"expert_parallel": 3}, "megatron.expert_parallel", "8 experts"),
        (Family.qwen3_moe, {"tensor_parallel": 2}, "megatron.sequence_parallel", "sequence_parallel=true"),
    ],
)
def test_layouts_that_do_not_fit_the_student_are_named(family, settings, key, message):
    (problem,) = architecture_problems(tiny(family), MegatronConfig(**settings), trainable=True)
    assert problem.key == key
    assert re.search(message, str(problem))


def test_a_dense_teacher_of_another_depth_lives_in_the_layout_of_a_student_with_experts():
    layout = MegatronConfig(expert_parallel=2, pipeline_parallel=2, pipeline_layers=[1, 2])
    assert architecture_problems(tiny(Family.qwen3), layout, trainable=False) == []


@pytest.mark.parametrize("changes", [{"num_kv_heads": 3}, {"head_dim": 15}])
def test_impossible_heads_are_named(changes):
    (problem,) = architecture_problems(tiny(Family.qwen3, **changes), MegatronConfig(), trainable=True)
    assert problem.key == f"model.architecture.{next(iter(changes))}"


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="it is installed")
def test_transformer_engine_is_asked_for_by_name(tmp_path):
    settings = ModelConfig(attention_backend=AttentionBackend.te)
    with started(tmp_path) as runtime, pytest.raises(MissingExtra, match="transformer-engine"):
        build_model(runtime, tiny(Family.qwen3), settings, MegatronConfig(), trainable=True)
