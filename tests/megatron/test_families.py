import json
from pathlib import Path

import pytest
import torch

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.families.base import Layout, RopeScaling, hf_shapes, shard, unshard, weight_rules
from opd_trainer.megatron.families.experts import Experts
from opd_trainer.megatron.families.registry import architecture_from_hf, to_hf_config
from opd_trainer.megatron.huggingface import SafetensorsReader, load_hf_weights, tensor_files
from opd_trainer.model.config import Family
from tests.megatron.models import build, hf_model, pack, sequences, started, tiny

CASES = [
    *((family, {"tie_embeddings": tied}) for family in Family for tied in (True, False)),
    (Family.llama, {"rope_scaling": RopeScaling(factor=8.0), "rope_theta": 500000.0}),
    (Family.qwen3, {"num_kv_heads": 4}),
    (Family.qwen2, {"num_kv_heads": 1}),
    (Family.qwen3_moe, {"experts": Experts(count=4, per_token=3, intermediate_size=24, normalize=False)}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_logits_equal_transformers(family, changes, tmp_path):
    architecture = tiny(family, **changes)
    reference = hf_model(architecture)
    reference.save_pretrained(tmp_path / "hf")
    assert architecture_from_hf(json.loads((tmp_path / "hf/config.json").read_text())) == architecture

    rows = sequences()
    with torch.no_grad():
        expected = torch.cat([reference(row[None]).logits[0] for row in rows])
    with started(tmp_path) as runtime:
        model = build(runtime, architecture)
        load_hf_weights(model, tmp_path / "hf")
        actual = model.forward(pack(rows))
    assert expected.std() > 0.5
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", list(Family))
def test_gradients_equal_transformers(family, tmp_path):
    architecture = tiny(family)
    reference = hf_model(architecture)
    reference.save_pretrained(tmp_path / "hf")
    rows = sequences((9, 4))
    weight = torch.randn(13, architecture.vocab_size, generator=torch.Generator().manual_seed(2))
    (torch.cat([reference(row[None]).logits[0] for row in rows]) * weight).sum().backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    # Under the names of its files, in which experts are apart.
    reference.save_pretrained(tmp_path / "gradients")
    with SafetensorsReader(tensor_files(tmp_path / "gradients")) as expected, started(tmp_path) as runtime:
        model = build(runtime, architecture)
        load_hf_weights(model, tmp_path / "hf")
        (model.forward(pack(rows)) * weight).sum().backward()
        for rule, parameter in model.parameters():
            assert parameter.grad is not None
            grads = unshard([parameter.grad], rule.layout, architecture)
            for name, grad in zip(rule.huggingface, grads, strict=True):
                want = expected.read(name)
                assert torch.allclose(grad, want, atol=1e-4 * want.abs().max().item()), name


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", list(Family))
def test_sharding_is_invertible(family, size):
    architecture = tiny(family, tie_embeddings=False)
    shapes = hf_shapes(architecture)
    for rule in weight_rules(architecture):
        tensors = [torch.randn(shapes[name]) for name in rule.huggingface]
        shards = [shard(tensors, rule.layout, architecture, rank, size) for rank in range(size)]
        for before, after in zip(tensors, unshard(shards, rule.layout, architecture), strict=True):
            assert torch.equal(before, after)


def test_fused_qkv_is_interleaved_by_group():
    architecture = tiny(Family.llama, num_heads=4, num_kv_heads=2, head_dim=1)
    q, k, v = torch.arange(4.0), torch.tensor([10.0, 11.0]), torch.tensor([20.0, 21.0])
    assert shard([q, k, v], Layout.qkv, architecture, 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert shard([q, k, v], Layout.qkv, architecture, 1, 2).tolist() == [2, 3, 11, 21]


def test_gate_and_up_are_stacked_per_rank():
    gate, up = torch.arange(4.0), torch.arange(10.0, 14.0)
    assert shard([gate, up], Layout.gate_up, tiny(Family.llama), 1, 2).tolist() == [2, 3, 12, 13]


def test_unknown_family_names_the_known_ones():
    with pytest.raises(CheckpointError, match=r"'mamba'.*llama, qwen2, qwen3.*opd=sglang"):
        architecture_from_hf({"model_type": "mamba"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling is .*yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "rope scaling is"),
    ],
)
def test_what_is_not_built_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        architecture_from_hf({**to_hf_config(tiny(Family.qwen3)), **change})


@pytest.mark.parametrize(
    ("family", "key"),
    [(Family.qwen3, "hidden_size"), (Family.qwen3_moe, "num_experts"), (Family.qwen3_moe, "moe_intermediate_size")],
)
def test_missing_shape_is_named(family, key):
    config = to_hf_config(tiny(family))
    del config[key]
    with pytest.raises(CheckpointError, match=rf"{key} missing.*Download the model's own config\.json again"):
        architecture_from_hf(config)


def test_old_spelling_of_rope():
    config = to_hf_config(tiny(Family.llama, rope_theta=77.0))
    del config["rope_parameters"]
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    architecture = architecture_from_hf({**config, "rope_scaling": scaling})
    assert architecture.rope_theta == 77.0
    assert architecture.rope_scaling == RopeScaling(factor=4.0)


def test_one_file_per_family():
    folder = Path(__file__).parents[2] / "opd_trainer/megatron/families"
    assert {family.value for family in Family} <= {path.stem for path in folder.glob("*.py")}
