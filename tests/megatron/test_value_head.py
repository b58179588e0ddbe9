"""Value models against transformers, and the way from a language model to a value model."""

import json

import pytest
import torch

from opd_trainer.errors import CheckpointError
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import VALUE_HEAD
from opd_trainer.megatron.families.registry import architecture_from_hf
from opd_trainer.megatron.huggingface import export_hf_weights, load_hf_weights, save_hf_folder
from opd_trainer.megatron.source import load_model
from opd_trainer.model.config import Family, ModelConfig
from tests.megatron.models import build, hf_model, pack, sequences, started, tiny

DENSE = (Family.llama, Family.qwen2, Family.qwen3)


@pytest.mark.parametrize("family", DENSE)
def test_values_equal_transformers(family, tmp_path):
    from transformers import AutoModelForSequenceClassification

    architecture = tiny(family).with_value_head()
    rows = sequences()
    with started(tmp_path) as runtime:
        model = build(runtime, architecture)
        head = model.modules[0].get_parameter("output_layer.weight")
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(3)))
        values = model.forward(pack(rows))
        save_hf_folder(model, tmp_path / "out", tmp_path)
        again = build(runtime, architecture)
        load_hf_weights(again, tmp_path / "out")
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(model.parameters(), again.parameters(), strict=True))
    assert (values.shape, values.dtype) == ((sum(map(len, rows)), 1), torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert architecture_from_hf(config) == architecture
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = torch.cat([reference.model(row[None]).last_hidden_state[0] for row in rows])
        torch.testing.assert_close(values.detach(), reference.score(hidden), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_becomes_a_value_model_that_gives_0(tied, tmp_path):
    reference = hf_model(tiny(Family.qwen3, tie_embeddings=tied))
    reference.save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "tokenizer.json").touch()
    settings = ModelConfig(load=str(tmp_path / "lm"))
    with started(tmp_path) as runtime:
        model = load_model(runtime, settings, MegatronConfig(), vocab_size=None, trainable=True, value_head=True).model
        weights = dict(export_hf_weights(model))
        values = model.forward(pack(sequences()))
    assert not bool(values.any())
    assert not bool(weights.pop(VALUE_HEAD).any())
    expected = reference.state_dict()
    expected.pop("lm_head.weight")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_value_model_keeps_its_head_and_must_have_one(tmp_path):
    with started(tmp_path) as runtime:
        model = build(runtime, tiny(Family.qwen2).with_value_head())
        head = model.modules[0].get_parameter("output_layer.weight")
        with torch.no_grad():
            head.fill_(0.5)
        save_hf_folder(model, tmp_path / "critic", tmp_path)
        settings = ModelConfig(load=str(tmp_path / "critic"))
        loaded = load_model(runtime, settings, MegatronConfig(), vocab_size=None, trainable=True, value_head=True)
        assert bool((loaded.model.modules[0].get_parameter("output_layer.weight") == 0.5).all())
        with pytest.raises(CheckpointError, match="a value model, which gives no log-probs"):
            load_model(runtime, settings, MegatronConfig(), vocab_size=None, trainable=False)
        hf_model(tiny(Family.qwen2)).save_pretrained(tmp_path / "headless")
        (tmp_path / "headless" / "config.json").write_text((tmp_path / "critic" / "config.json").read_text())
        with pytest.raises(CheckpointError, match=f"missing {VALUE_HEAD}"):
            load_hf_weights(model, tmp_path / "headless")
