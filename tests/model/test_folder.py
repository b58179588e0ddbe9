import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from opd_trainer.errors import CheckpointError
from opd_trainer.model.config import ModelConfig
from opd_trainer.model.folder import (
    CheckpointKind,
    eos_token_ids,
    huggingface_folder,
    inspect,
    language_setting,
    load_config,
    load_tokenizer,
)


def torch_dist(folder, *steps, latest=None):
    for step in steps:
        (folder / f"iter_{step:07d}").mkdir(parents=True)
        (folder / f"iter_{step:07d}" / ".metadata").touch()
    if latest is not None:
        (folder / "latest_checkpointed_iteration.txt").write_text(f"{latest}\n")
    return folder


def write_tokenizer(folder, tokens=("<pad>", "<eos>", "a", "b")):
    vocabulary = {token: index for index, token in enumerate(tokens)}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), eos_token=tokens[1])
    fast.save_pretrained(folder)


def test_huggingface_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = inspect(tmp_path)
    assert (found.kind, found.path, found.step) == (CheckpointKind.huggingface, tmp_path, None)
    with pytest.raises(CheckpointError, match="holds no steps"):
        inspect(tmp_path, 3)


def test_parent_and_iteration_are_the_same_checkpoint(tmp_path):
    torch_dist(tmp_path, 5, 20, 100, latest=20)
    found = inspect(str(tmp_path))
    assert (found.kind, found.path, found.step) == (CheckpointKind.torch_dist, tmp_path / "iter_0000020", 20)
    assert inspect(tmp_path / "iter_0000020") == found
    assert inspect(tmp_path, 5).step == inspect(tmp_path / "iter_0000005", 5).step == 5


def test_without_a_marker_the_latest_is_the_highest(tmp_path):
    assert inspect(torch_dist(tmp_path, 5, 100, 20)).step == 100


def test_incomplete_iterations_do_not_count(tmp_path):
    torch_dist(tmp_path, 5)
    (tmp_path / "iter_0000009").mkdir()
    assert inspect(tmp_path).step == 5


@pytest.mark.parametrize(
    ("step", "message"), [(7, "no checkpoint of step 7: it has 5, 20"), (None, "no checkpoint of step 30")]
)
def test_a_step_that_is_not_there(step, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        inspect(torch_dist(tmp_path, 5, 20, latest=30), step)


def test_a_step_beside_another_iteration(tmp_path):
    with pytest.raises(CheckpointError, match="step 5, but ckpt_step is 6"):
        inspect(torch_dist(tmp_path, 5) / "iter_0000005", 6)


def test_a_run_directory_stands_for_its_model_or_its_latest_checkpoint(tmp_path):
    torch_dist(tmp_path / "checkpoints", 5, 20, latest=20)
    newest = inspect(tmp_path)
    assert (newest.path, newest.step) == (tmp_path / "checkpoints" / "iter_0000020", 20)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    exported = inspect(tmp_path)
    assert (exported.kind, exported.path) == (CheckpointKind.huggingface, tmp_path / "model")
    assert inspect(tmp_path, 5).path == tmp_path / "checkpoints" / "iter_0000005"


def test_a_release_has_no_step_and_comes_first_where_the_marker_says_so(tmp_path):
    torch_dist(tmp_path, 5)
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / ".metadata").touch()
    assert inspect(tmp_path).step == 5
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    found = inspect(tmp_path)
    assert (found.path, found.step) == (tmp_path / "release", None)


def test_what_a_model_of_several_parts_says_of_its_language_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 7}, "hidden_size": 3}))
    assert (language_setting(tmp_path, "vocab_size"), language_setting(tmp_path, "hidden_size")) == (7, 3)
    with pytest.raises(CheckpointError, match=r"says nothing of max_position_embeddings.*Download"):
        language_setting(tmp_path, "max_position_embeddings")


def test_missing_path(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect(tmp_path / "nowhere")


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="this is a file"):
        inspect(tmp_path / "model.safetensors")


def test_a_folder_without_a_checkpoint_says_what_it_has(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*It has nothing in it"):
        inspect(tmp_path)
    for number in range(7):
        (tmp_path / f"notes{number}").touch()
    with pytest.raises(CheckpointError, match=r"It has notes0, .*notes4 and 2 more"):
        inspect(tmp_path)


def test_where_config_and_tokenizer_come_from(tmp_path):
    hf, dist = tmp_path / "hf", torch_dist(tmp_path / "dist", 5)
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    assert huggingface_folder(ModelConfig(load=str(hf))) == hf
    assert huggingface_folder(ModelConfig(load=str(dist), huggingface=str(hf))) == hf
    with pytest.raises(CheckpointError, match=r"Set model\.huggingface"):
        huggingface_folder(ModelConfig(load=str(dist)))
    with pytest.raises(CheckpointError, match="no such folder"):
        huggingface_folder(ModelConfig(huggingface=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[]", "is no JSON object")])
def test_broken_config(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_missing_config_and_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_broken_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_end_of_sequence_from_every_source(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_vocab()["a"] == 2
    assert eos_token_ids(tmp_path, tokenizer) == (1,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert eos_token_ids(tmp_path, tokenizer) == (1, 2, 3)
