import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_trainer.errors import CheckpointError, ShapeMismatch
from opd_trainer.megatron import huggingface
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.huggingface import export_hf_weights, load_hf_weights, save_hf_folder
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import Family
from opd_trainer.model.folder import TOKENIZER_FILES
from tests.gloo import run_gloo
from tests.megatron.models import build, hf_model, pack, sequences, started, tiny

LAYOUTS = {
    "tensor": MegatronConfig(tensor_parallel=2, timeout_s=300),
    "pipeline": MegatronConfig(pipeline_parallel=2, timeout_s=300),
}


def saved(folder, architecture):
    model = hf_model(architecture)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(Family))
def test_round_trip_is_bit_exact(family, tied, tmp_path):
    architecture = tiny(family, tie_embeddings=tied)
    saved(tmp_path / "in", architecture)
    for name in TOKENIZER_FILES:
        (tmp_path / "in" / name).write_text("{}")
    with started(tmp_path) as runtime:
        model = build(runtime, architecture)
        load_hf_weights(model, tmp_path / "in")
        save_hf_folder(model, tmp_path / "out", tmp_path / "in")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all((tmp_path / "out" / name).is_file() for name in TOKENIZER_FILES)


def test_transformers_loads_what_we_save(tmp_path):
    from transformers import AutoModelForCausalLM

    architecture = tiny(Family.qwen3)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/config.json").write_text(json.dumps({"eos_token_id": 5, "model_type": "other"}))
    rows = sequences()
    with started(tmp_path) as runtime:
        model = build(runtime, architecture, trainable=False)
        save_hf_folder(model, tmp_path / "out", tmp_path / "tokenizer")
        ours = model.forward(pack(rows))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs = torch.cat([reloaded(row[None]).logits[0] for row in rows])
    assert (ours - theirs).abs().max() < 1e-4
    assert reloaded.config.eos_token_id == 5
    assert reloaded.config.model_type == "qwen3"


def test_several_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "MAX_FILE_BYTES", 20_000)
    architecture = tiny(Family.llama, tie_embeddings=False)
    reference = saved(tmp_path / "in", architecture)
    with started(tmp_path) as runtime:
        model = build(runtime, architecture)
        load_hf_weights(model, tmp_path / "in")
        save_hf_folder(model, tmp_path / "out", tmp_path / "in", torch.bfloat16)
        again = build(runtime, architecture)
        load_hf_weights(again, tmp_path / "out")
        weights = dict(export_hf_weights(again))
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    for name, parameter in reference.named_parameters():
        assert torch.equal(weights[name], parameter.to(torch.bfloat16).float()), name


def load_on_two_ranks(rank, world_size, rendezvous, folder):
    for layout, settings in LAYOUTS.items():
        runtime = MegatronRuntime(rank, world_size, rendezvous + layout, settings, 0)
        runtime.start()
        model = build(runtime, tiny(Family.qwen2))
        load_hf_weights(model, folder / "in")
        save_hf_folder(model, folder / layout, folder / "in")
        runtime.close()


def test_round_trip_through_two_ranks_is_bit_exact(tmp_path):
    saved(tmp_path / "in", tiny(Family.qwen2))
    run_gloo(load_on_two_ranks, 2, tmp_path)
    before = load_file(tmp_path / "in/model.safetensors")
    for layout in LAYOUTS:
        after = load_file(tmp_path / layout / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), CheckpointError, "missing model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), CheckpointError, "unexpected extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}),
            ShapeMismatch,
            r"model.norm.weight: shape \(7,\).*asks for \(32,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(edit, error, message, tmp_path):
    architecture = tiny(Family.qwen3)
    saved(tmp_path / "in", architecture)
    tensors = load_file(tmp_path / "in/model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "in/model.safetensors")
    with started(tmp_path) as runtime, pytest.raises(error, match=message):
        load_hf_weights(build(runtime, architecture), tmp_path / "in")


def test_a_folder_without_safetensors(tmp_path):
    with started(tmp_path) as runtime, pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        load_hf_weights(build(runtime, tiny(Family.qwen3)), tmp_path)


def test_an_index_whose_file_is_missing(tmp_path):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / huggingface.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors, which is not there: download it again"):
        huggingface.tensor_files(tmp_path)
