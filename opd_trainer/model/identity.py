"""Who a model is: fingerprints of its vocabulary, template and weights, and what two models must share.

Log-probs of two models may be subtracted only where the same id means the same token in both.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_trainer.errors import Problem
from opd_trainer.model.folder import RANK_FILE, eos_token_ids, language_setting, load_tokenizer
from opd_trainer.types import ModelIdentity

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096
"""A fingerprint of weights reads so many pieces of this size from each file, evenly spaced."""

WEIGHT_FILES = ("*.safetensors", "*.distcp", f"mp_rank_*/{RANK_FILE}")
"""Where the formats keep weights."""

SHOWN = 3
"""Differing tokens that a message lists."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model's identity and the maps behind its fingerprints.

    Attributes:
        identity: what is recorded.
        vocabulary: token to id.
    """

    identity: ModelIdentity
    vocabulary: Mapping[str, int]


def profile(folder: Path, weights: Path) -> ModelProfile:
    """Reads tokenizer and config of a Hugging Face folder, and fingerprints the weights.

    Args:
        folder: Hugging Face folder with config.json and tokenizer.
        weights: folder of the weights (the same one, or a torch_dist checkpoint).

    Raises:
        CheckpointError: config.json or the tokenizer is missing, or the former does not tell the context length.
    """
    tokenizer = load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    template = tokenizer.chat_template
    identity = ModelIdentity(
        path=str(weights),
        weights=weights_fingerprint(weights),
        vocabulary=_digest(json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]))),
        vocab_size=max(vocabulary.values(), default=-1) + 1,
        eos_token_ids=eos_token_ids(folder, tokenizer),
        chat_template=_digest(json.dumps(template, sort_keys=True)) if template else "",
        max_length=language_setting(folder, "max_position_embeddings"),
    )
    return ModelProfile(identity, vocabulary)


def weights_fingerprint(folder: Path) -> str:
    """A cheap fingerprint of the weights in a folder: sizes and evenly spaced samples of its files; "" without any."""
    files = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}/{size}/".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES_PER_FILE):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES_PER_FILE - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def check_compatible(key: str, student: ModelProfile, teacher: ModelProfile) -> list[Problem]:
    """What forbids comparing the log-probs of two models; empty when nothing does.

    A difference of ids that only one of the vocabularies has counts too: the student might sample them.

    Args:
        key: the teacher's configuration key, for the messages.
        student: whose tokens are scored.
        teacher: who scores them.
    """
    problems = []
    differing = differing_ids(student.vocabulary, teacher.vocabulary)
    if differing:
        first = "; ".join(f"{number} {ours!r} vs {theirs!r}" for number, ours, theirs in differing[:SHOWN])
        what = f"the tokenizer differs from the student's at {len(differing)} ids (student vs teacher: {first})"
        why = "log-probs would be those of other words"
        problems.append(Problem(key, what, why, "Use a teacher with the student's tokenizer"))
    ours, theirs = student.identity.eos_token_ids, teacher.identity.eos_token_ids
    if not set(ours) & set(theirs):
        what = f"the teacher ends responses with {_names(theirs, teacher)}, the student with {_names(ours, student)}"
        why = "the teacher would teach the student not to stop"
        fix = "Use a pair that shares an EOS token (base with base, instruct with instruct)"
        problems.append(Problem(key, what, why, fix))
    return problems


def remarks(student: ModelIdentity, teacher: ModelIdentity) -> list[str]:
    """Differences between two models that do not forbid distillation, but often explain why it goes wrong."""
    found = []
    if student.chat_template != teacher.chat_template:
        found.append("student and teacher have different chat templates: the teacher sees the student's")
    if set(student.eos_token_ids) != set(teacher.eos_token_ids):
        found.append(
            f"student and teacher have different EOS tokens: {list(student.eos_token_ids)} and "
            f"{list(teacher.eos_token_ids)}"
        )
    if teacher.max_length < student.max_length:
        found.append(f"the teacher's context is shorter: {teacher.max_length} against {student.max_length} tokens")
    if student.weights and student.weights == teacher.weights:
        found.append("student and teacher have the same weights: there is nothing to learn")
    return found


def differing_ids(student: Mapping[str, int], teacher: Mapping[str, int]) -> list[tuple[int, str | None, str | None]]:
    """Ids that do not mean the same token in both vocabularies: (id, student's token, teacher's token), by id."""
    ours = {number: token for token, number in student.items()}
    theirs = {number: token for token, number in teacher.items()}
    ids = sorted(ours.keys() | theirs.keys())
    return [(number, ours.get(number), theirs.get(number)) for number in ids if ours.get(number) != theirs.get(number)]


def _names(ids: Sequence[int], model: ModelProfile) -> str:
    tokens = {number: token for token, number in model.vocabulary.items()}
    return ", ".join(f"{number} {tokens.get(number)!r}" for number in ids) or "nothing"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
