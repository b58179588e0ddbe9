"""Checkpoints by the conventions of Megatron-LM and slime give the logits of the model that they were made from."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_trainer.errors import CheckpointError, ShapeMismatch
from opd_trainer.megatron import source
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.families.base import Architecture
from opd_trainer.megatron.huggingface import SafetensorsReader, export_hf_weights, tensor_files
from opd_trainer.model.config import Dtype, Family, ModelConfig
from opd_trainer.model.folder import CheckpointKind, inspect
from tests.gloo import run_gloo
from tests.megatron import foreign
from tests.megatron.models import hf_model, pack, sequences, started, tiny

pytestmark = [pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")]

PADDED = 64
HOMOGENEOUS: dict[str, bool] = {}
PER_LAYER = {"non_homogeneous_layers": True}
NEWEST = {"singleton_local_shards": True}


def saved(folder: Path, architecture: Architecture) -> Any:
    model = hf_model(architecture)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return model


def padded(folder: Path, architecture: Architecture) -> Architecture:
    """What is written: `folder`/hf with a padded vocabulary, in `folder`/padded."""
    foreign.pad_vocabulary(folder / "hf", folder / "padded", PADDED)
    return replace(architecture, vocab_size=PADDED)


def check(folder: Path, checkpoint: Path, reference: Any) -> None:
    """Loads it as `model.load` does, into a process with other random weights, and compares with transformers."""
    settings = ModelConfig(load=str(checkpoint), huggingface=str(folder))
    rows = sequences()
    with started(checkpoint, seed=3) as runtime:
        model = source.load_model(runtime, settings, runtime.settings, vocab_size=None, trainable=False).model
        weights = dict(export_hf_weights(model))
        logits = model.forward(pack(rows))
    files = tensor_files(folder)
    assert weights.keys() == files.keys()
    with SafetensorsReader(files) as reader:
        assert [name for name in files if not torch.equal(weights[name], reader.read(name))] == []
    with torch.no_grad():
        theirs = torch.cat([reference(row[None]).logits[0] for row in rows])
    assert (logits - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("metadata", [HOMOGENEOUS, PER_LAYER, NEWEST], ids=["stacked", "per_layer", "newest"])
@pytest.mark.parametrize("family", [Family.qwen2, Family.qwen3_moe])
def test_torch_dist_under_the_names_of_each_version(family: Family, metadata: dict[str, bool], tmp_path: Path) -> None:
    architecture = tiny(family, tie_embeddings=False)
    reference = saved(tmp_path / "hf", architecture)
    with started(tmp_path) as runtime:
        model = foreign.loaded(runtime, padded(tmp_path, architecture), tmp_path / "padded")
        foreign.save_torch_dist(runtime, model, tmp_path / "megatron", metadata, "iter_0000020")
    check(tmp_path / "hf", tmp_path / "megatron", reference)


def test_a_release_as_slime_converts_it(tmp_path: Path) -> None:
    architecture = tiny(Family.qwen3)
    reference = saved(tmp_path / "hf", architecture)
    with started(tmp_path) as runtime:
        model = foreign.loaded(runtime, padded(tmp_path, architecture), tmp_path / "padded")
        foreign.save_torch_dist(runtime, model, tmp_path / "megatron", HOMOGENEOUS, "release")
    assert (tmp_path / "megatron" / foreign.MARKER).read_text() == "release"
    check(tmp_path / "hf", tmp_path / "megatron", reference)
    check(tmp_path / "hf", tmp_path / "megatron" / "release", reference)


@pytest.mark.parametrize("moments", ["optimizer.state.exp_avg.", "chained_0.optimizer.state.exp_avg."])
def test_optimizer_state_is_not_taken_for_weights(moments: str, tmp_path: Path) -> None:
    architecture = tiny(Family.qwen3)
    saved(tmp_path / "hf", architecture)
    with started(tmp_path) as runtime:
        model = foreign.loaded(runtime, architecture, tmp_path / "hf")
        model.modules[0].to(torch.bfloat16)
        foreign.save_torch_dist(runtime, model, tmp_path / "megatron", HOMOGENEOUS, "iter_0000020", moments)
    assert source.lossless_dtype(inspect(tmp_path / "megatron")) is Dtype.bfloat16


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    architecture = tiny(Family.qwen3)
    saved(tmp_path / "hf", architecture)
    saved(tmp_path / "larger", replace(architecture, vocab_size=architecture.vocab_size + 3))
    with started(tmp_path) as runtime:
        model = foreign.loaded(runtime, architecture, tmp_path / "hf")
        foreign.save_torch_dist(runtime, model, tmp_path / "megatron", HOMOGENEOUS, "iter_0000020")
    with pytest.raises(ShapeMismatch, match=r"53 rows and config\.json asks for 56"):
        check(tmp_path / "larger", tmp_path / "megatron", None)


LAYOUTS = {
    "tensor_and_pipeline": (Family.qwen2, MegatronConfig(tensor_parallel=2, pipeline_parallel=2, timeout_s=300), 4),
    "experts": (Family.qwen3_moe, MegatronConfig(expert_parallel=2, timeout_s=300), 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rank_files_of_several_ranks(layout: str, tied: bool, tmp_path: Path) -> None:
    family, settings, world_size = LAYOUTS[layout]
    architecture = tiny(family, tie_embeddings=tied)
    reference = saved(tmp_path / "hf", architecture)
    directory = tmp_path / "megatron" / "iter_0000020"
    run_gloo(
        foreign.save_ranks,
        world_size,
        foreign.Job(tmp_path / "padded", directory, padded(tmp_path, architecture), settings),
    )
    (tmp_path / "megatron" / foreign.MARKER).write_text("20")
    found = inspect(tmp_path / "megatron")
    assert (found.kind, found.path, found.step) == (CheckpointKind.torch, directory, 20)
    assert source.lossless_dtype(found) is Dtype.float32
    check(tmp_path / "hf", tmp_path / "megatron", reference)


def test_torch_dist_of_several_ranks(tmp_path: Path) -> None:
    architecture = tiny(Family.qwen3, tie_embeddings=False)
    reference = saved(tmp_path / "hf", architecture)
    settings = MegatronConfig(tensor_parallel=2, timeout_s=300)
    run_gloo(
        foreign.save_dist_ranks,
        2,
        foreign.Job(tmp_path / "padded", tmp_path / "megatron", padded(tmp_path, architecture), settings),
    )
    check(tmp_path / "hf", tmp_path / "megatron", reference)


def states(folder: Path, architecture: Architecture) -> dict[str, Any]:
    with started(folder) as runtime:
        return dict(foreign.loaded(runtime, padded(folder, architecture), folder / "padded").modules[0].state_dict())


def test_rank_files_with_several_chunks_of_layers(tmp_path: Path) -> None:
    """Interleaved stages: stage 0 has layers 0 and 2, stage 1 has 1 and 3."""
    architecture = tiny(Family.llama, num_layers=4)
    reference = saved(tmp_path / "hf", architecture)
    whole = states(tmp_path, architecture)
    for stage in range(2):
        chunks: list[dict[str, Any]] = []
        for chunk in range(2):
            layer = f"decoder.layers.{2 * chunk + stage}."
            mine = {name.replace(layer, "decoder.layers.0."): v for name, v in whole.items() if name.startswith(layer)}
            if (stage, chunk) == (0, 0):
                mine["embedding.word_embeddings.weight"] = whole["embedding.word_embeddings.weight"]
            if (stage, chunk) == (1, 1):
                mine["decoder.final_layernorm.weight"] = whole["decoder.final_layernorm.weight"]
            chunks.append(mine)
        name = f"mp_rank_00_{stage:03d}"
        foreign.save_rank_file(tmp_path / "megatron", name, chunks, transformer_engine=True)
    check(tmp_path / "hf", tmp_path / "megatron", reference)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one rank."""
    architecture = tiny(Family.qwen3)
    saved(tmp_path / "hf", architecture)
    state = states(tmp_path, architecture)
    foreign.save_rank_file(tmp_path / "megatron", "mp_rank_00", [state], transformer_engine=False)
    return tmp_path


class Trap:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "run"))


def test_code_in_a_rank_file_is_refused_and_not_run(single: Path) -> None:
    path = single / "megatron" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    torch.save(state | {"args": Trap(single / "ran")}, path)
    with pytest.raises(CheckpointError, match="cannot be read as weights only"):
        check(single / "hf", single / "megatron", None)
    assert not (single / "ran").exists()
    pickle.loads(pickle.dumps(Trap(single / "ran")))
    assert (single / "ran").exists(), "the trap works"


def test_a_missing_tensor_is_named(single: Path) -> None:
    path = single / "megatron" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    del state["model"]["decoder.layers.1.mlp.linear_fc2.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"has no decoder.layers.1.mlp.linear_fc2.weight"):
        check(single / "hf", single / "megatron", None)


def test_without_a_folder_with_config_and_tokenizer_the_key_is_named(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Set model.huggingface to a folder that has both"):
        source.config_folder(ModelConfig(load=str(single / "megatron")))
