import dataclasses

import pytest

from opd_trainer.errors import ConfigError, ShapeMismatch
from opd_trainer.megatron.families.registry import architecture_from_config
from opd_trainer.model.config import Family
from opd_trainer.model.identity import ModelProfile
from opd_trainer.teacher.shapes import check_columns, check_same_shape, check_vocabulary
from opd_trainer.types import ModelIdentity
from tests.megatron.training import SHAPE

STUDENT = architecture_from_config(SHAPE, 22)


def profile(tokens: str, eos: int = 0) -> ModelProfile:
    identity = ModelIdentity(
        path="x",
        weights="",
        vocabulary=tokens,
        vocab_size=len(tokens),
        eos_token_ids=(eos,),
        chat_template="",
        max_length=64,
    )
    return ModelProfile(identity, {token: number for number, token in enumerate(tokens)})


def test_the_same_shape_passes_whatever_does_not_shape_parameters():
    check_same_shape("teacher", STUDENT, dataclasses.replace(STUDENT, rope_theta=5e5, max_length=4096, norm_eps=1e-5))


def test_a_mismatch_has_a_table_of_the_differing_fields_only():
    teacher = dataclasses.replace(STUDENT, hidden_size=64, num_layers=3, num_kv_heads=1, vocab_size=30)
    with pytest.raises(ShapeMismatch) as caught:
        check_same_shape("teachers.math", STUDENT, teacher)
    rows = [line.split() for line in str(caught.value).splitlines()[1:-1]]
    assert rows == [
        ["student", "teacher"],
        ["hidden_size", "32", "64"],
        ["num_layers", "2", "3"],
        ["num_kv_heads", "2", "1"],
        ["vocab_size", "22", "30"],
    ]
    assert "teachers.math: the teacher does not have the student's shape" in str(caught.value)
    assert "opd=sglang" in str(caught.value)
    assert "+model@teachers.math.model" in str(caught.value)


@pytest.mark.parametrize("family", [Family.llama, Family.qwen2])
def test_another_family_is_another_shape(family):
    teacher = architecture_from_config(dataclasses.replace(SHAPE, family=family), 22)
    with pytest.raises(ShapeMismatch, match=r"family +qwen3 +" + family):
        check_same_shape("teacher", STUDENT, teacher)


def test_vocabularies_must_agree_and_padding_need_not():
    check_vocabulary("teacher", profile("abc"), profile("abc"), dataclasses.replace(STUDENT, vocab_size=128))
    with pytest.raises(ConfigError, match="tokenizer differs from the student's at 1 ids"):
        check_vocabulary("teacher", profile("abc"), profile("abd"), STUDENT)
    with pytest.raises(ConfigError, match="not to stop"):
        check_vocabulary("teacher", profile("abc"), profile("abc", eos=1), STUDENT)
    with pytest.raises(ShapeMismatch, match="output head has 2 rows and the student's vocabulary 3 ids"):
        check_vocabulary("teacher", profile("abc"), profile("abc"), dataclasses.replace(STUDENT, vocab_size=2))


@pytest.mark.parametrize(("student", "teacher", "ranks"), [(22, 30, 1), (22, 22, 2), (21, 22, 2)])
def test_ranks_that_cut_both_vocabularies_alike(student: int, teacher: int, ranks: int) -> None:
    check_columns("teacher", student, teacher, ranks)


def test_ranks_that_would_hold_other_ids_of_the_teacher() -> None:
    with pytest.raises(ShapeMismatch, match=r"teachers\.math: .* 2 tensor-parallel ranks cut the student's 22 ids"):
        check_columns("teachers.math", 22, 30, 2)
