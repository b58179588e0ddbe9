"""Whether a Megatron teacher fits where it is going to live; found out from configs, before any weight is read."""

import dataclasses
from collections.abc import Sequence

from opd_trainer.errors import ConfigError, ShapeMismatch
from opd_trainer.megatron.families.base import Architecture, hf_shapes, padded_vocab_size
from opd_trainer.megatron.live_weights import interchangeable
from opd_trainer.model.identity import ModelProfile, check_compatible

SHAPE_FIELDS = (
    "family",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "experts",
    "vocab_size",
    "tie_embeddings",
    "qkv_bias",
    "qk_norm",
)
"""Fields of an architecture that decide the names and shapes of its parameters."""


def check_same_shape(key: str, student: Architecture, teacher: Architecture) -> None:
    """Compares the parameters of a teacher that was declared to be of the student's shape.

    Args:
        key: the teacher's configuration key, for the message.
        student: the student's architecture.
        teacher: the teacher's architecture.

    Raises:
        ShapeMismatch: names or shapes differ; the message has a table of the fields with both values.
    """
    ours, theirs = hf_shapes(student), hf_shapes(teacher)
    differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if not differing and student.family == teacher.family:
        return
    rows = [
        (field.name, str(getattr(student, field.name)), str(getattr(teacher, field.name)))
        for field in dataclasses.fields(Architecture)
        if field.name in SHAPE_FIELDS and getattr(student, field.name) != getattr(teacher, field.name)
    ]
    table = _table([("", "student", "teacher"), *rows])
    raise ShapeMismatch(
        f"{key}: the teacher does not have the student's shape ({len(differing)} of {len(ours.keys() | theirs.keys())} "
        f"parameters differ in name or shape), and {key}.model, which would give it a shape of its own, is not set:\n"
        f"{table}\n"
        f"Declare the teacher's own model with +model@{key}.model=base, or score it on a server with opd=sglang"
    )


def check_interchangeable(key: str, student: Architecture, teacher: Architecture) -> None:
    """Compares everything that one module would have to be for both.

    Args:
        key: the teacher's configuration key, for the message.
        student: the student's architecture.
        teacher: the teacher's architecture.

    Raises:
        ShapeMismatch: the module of the one does not compute what that of the other does.
    """
    if interchangeable(student, teacher):
        return
    rows = [
        (field.name, str(getattr(student, field.name)), str(getattr(teacher, field.name)))
        for field in dataclasses.fields(Architecture)
        if getattr(student, field.name) != getattr(teacher, field.name)
    ]
    table = _table([("", "student", "teacher"), *rows])
    choose = "teacher=" if key == "teacher" else f"+teacher@{key}="
    raise ShapeMismatch(
        f"{key}: swap computes student and teacher with the same module, and they are different models:\n{table}\n"
        f"Choose {choose}offload (its own module, on the host between uses), {choose}resident or {choose}dedicated"
    )


def check_vocabulary(key: str, student: ModelProfile, teacher: ModelProfile, architecture: Architecture) -> None:
    """Compares the vocabularies of student and teacher; the padding of the output head may differ.

    Args:
        key: the teacher's configuration key, for the message.
        student: whose tokens are scored.
        teacher: who scores them.
        architecture: the teacher's.

    Raises:
        ConfigError: the same id means different tokens, or they share no end-of-sequence token.
        ShapeMismatch: the teacher's output head has fewer rows than the vocabulary has ids.
    """
    problems = check_compatible(key, student, teacher)
    if problems:
        raise ConfigError(problems)
    needed = student.identity.vocab_size
    if architecture.vocab_size < needed:
        raise ShapeMismatch(
            f"{key}: the teacher's output head has {architecture.vocab_size} rows and the student's vocabulary "
            f"{needed} ids: the last ones cannot be scored. Use a teacher with the whole vocabulary"
        )


def check_columns(key: str, student: int, teacher: int, tensor_parallel: int) -> None:
    """Compares how tensor-parallel ranks would cut two vocabularies that are compared id by id.

    Args:
        key: the teacher's configuration key, for the message.
        student: rows of its output head.
        teacher: rows of its output head.
        tensor_parallel: ranks that share them.

    Raises:
        ShapeMismatch: a rank would have other ids of the one than of the other.
    """
    ours, theirs = (padded_vocab_size(size, tensor_parallel) for size in (student, teacher))
    if tensor_parallel > 1 and ours != theirs:
        raise ShapeMismatch(
            f"{key}: opd.divergence compares whole distributions, and {tensor_parallel} tensor-parallel ranks cut the "
            f"student's {student} ids at other places than the teacher's {teacher}: each rank would hold other ids of "
            "the one than of the other. Set megatron.tensor_parallel=1, or opd.divergence.kind=sampled"
        )


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
