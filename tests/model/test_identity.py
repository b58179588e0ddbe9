import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from opd_trainer.errors import CheckpointError
from opd_trainer.model.identity import check_compatible, differing_ids, profile, remarks, weights_fingerprint

TOKENS = ("<pad>", "<eos>", "a", "b")


def write_model(folder, tokens=TOKENS, eos="<eos>", template=None, seed=0):
    vocabulary = {token: index for index, token in enumerate(tokens)}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), eos_token=eos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    weights = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed))
    save_file({"weight": weights}, folder / "model.safetensors")
    return profile(folder, folder)


def test_profile(tmp_path):
    found = write_model(tmp_path / "m", template="{{ messages }}")
    assert found.identity.vocab_size == 4
    assert found.identity.eos_token_ids == (1,)
    assert found.identity.max_length == 64
    assert found.identity.chat_template
    assert found.vocabulary["b"] == 3
    assert profile(tmp_path / "m", tmp_path / "m") == found


def test_fingerprints_tell_models_apart(tmp_path):
    base = write_model(tmp_path / "a").identity
    assert base.chat_template == ""
    assert write_model(tmp_path / "b", seed=1).identity.weights != base.weights
    assert write_model(tmp_path / "c").identity.weights == base.weights
    other = write_model(tmp_path / "d", tokens=("<pad>", "<eos>", "b", "a")).identity
    assert other.vocabulary != base.vocabulary
    assert write_model(tmp_path / "e", template="x").identity.chat_template != base.chat_template


def test_a_change_anywhere_in_a_small_file_is_seen(tmp_path):
    write_model(tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    before, content = weights_fingerprint(tmp_path / "a"), bytearray(path.read_bytes()[: 4096 * 60])
    path.write_bytes(content)
    short = weights_fingerprint(tmp_path / "a")
    content[4096 * 31 + 5] ^= 1
    path.write_bytes(content)
    assert len({before, short, weights_fingerprint(tmp_path / "a")}) == 3


def test_no_weights(tmp_path):
    assert weights_fingerprint(tmp_path) == ""


def test_same_models_are_compatible(tmp_path):
    model = write_model(tmp_path / "a")
    assert check_compatible("teacher", model, model) == []


def test_differing_tokens_are_listed(tmp_path):
    student = write_model(tmp_path / "a")
    teacher = write_model(tmp_path / "b", tokens=("<pad>", "<eos>", "b", "a", "c"))
    (problem,) = check_compatible("teachers.maths", student, teacher)
    assert problem.key == "teachers.maths"
    assert "at 3 ids" in problem.what
    assert "2 'a' vs 'b'; 3 'b' vs 'a'; 4 None vs 'c'" in problem.what


def test_differing_end_of_sequence(tmp_path):
    student = write_model(tmp_path / "a")
    teacher = write_model(tmp_path / "b", eos="b")
    (problem,) = check_compatible("teacher", student, teacher)
    assert "ends responses with 3 'b', the student with 1 '<eos>'" in problem.what


def test_one_shared_end_of_sequence_is_enough(tmp_path):
    student, teacher = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    teacher = replace(teacher, identity=replace(teacher.identity, eos_token_ids=(1, 3)))
    assert check_compatible("teacher", student, teacher) == []
    assert any("EOS" in remark for remark in remarks(student.identity, teacher.identity))


def test_remarks(tmp_path):
    student = write_model(tmp_path / "a", template="x").identity
    teacher = replace(write_model(tmp_path / "b").identity, max_length=32)
    found = " ".join(remarks(student, teacher))
    assert "chat templates" in found
    assert "32 against 64" in found
    assert "same weights" in found
    assert remarks(student, replace(student, weights="other")) == []


def test_differing_ids_are_sorted():
    assert differing_ids({"a": 1, "b": 0}, {"a": 1, "c": 2}) == [(0, "b", None), (2, None, "c")]


def test_profile_needs_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        profile(tmp_path, tmp_path)
