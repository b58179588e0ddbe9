"""Engines, and how they are asked."""

from pathlib import Path

import torch

from opd_trainer.build.vocabulary import Vocabulary, vocabulary_of
from opd_trainer.build.workers import Workers
from opd_trainer.config import Config
from opd_trainer.megatron.module import DTYPES
from opd_trainer.opd.config import OpdType
from opd_trainer.protocols import RolloutEngine
from opd_trainer.rollout.config import EmbeddedRollout, SglangRollout
from opd_trainer.rollout.embedded.engine import EmbeddedEngine
from opd_trainer.rollout.embedded.worker import EmbeddedSpec
from opd_trainer.rollout.sglang.engine import SglangEngine, SglangSpec
from opd_trainer.teacher.inline import teacher_settings
from opd_trainer.types import Sampling


def embedded_spec(config: Config, vocabulary: Vocabulary) -> EmbeddedSpec:
    """An embedded engine for the model of `vocabulary`."""
    rollout = config.rollout if isinstance(config.rollout, EmbeddedRollout) else EmbeddedRollout()
    return EmbeddedSpec(
        config=vocabulary.config,
        tokenizer=vocabulary.tokenizer,
        eos_token_ids=vocabulary.eos_token_ids,
        rollout=rollout,
        dtype=DTYPES[config.model.dtype],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def build_engine(config: Config, vocabulary: Vocabulary, workers: Workers, output_dir: Path) -> RolloutEngine:
    """The engine that samples from the student."""
    if not isinstance(config.rollout, SglangRollout):
        return workers.rollout(embedded_spec(config, vocabulary))
    tokenizer = vocabulary.tokenizer
    folder, has_weights = served_folder(vocabulary, output_dir)
    spec = SglangSpec(
        folder=folder,
        has_weights=has_weights,
        eos_token_ids=vocabulary.eos_token_ids,
        decode=lambda responses: tokenizer.batch_decode(responses, skip_special_tokens=True),
        rollout=config.rollout,
        run_dir=output_dir,
    )
    return SglangEngine(spec)


def served_folder(vocabulary: Vocabulary, output_dir: Path) -> tuple[Path, bool]:
    """What servers of the student start from, and whether it has weights: they get the student's in any case.

    SGLang reads neither Megatron checkpoints nor folders with a tokenizer alone: it gets the shape.
    """
    if (vocabulary.folder / "config.json").is_file() and any(vocabulary.folder.glob("*.safetensors")):
        return vocabulary.folder, True
    shape = output_dir / "servers" / "shape"
    vocabulary.config.save_pretrained(shape)
    vocabulary.tokenizer.save_pretrained(shape)
    return shape, False


def build_teacher_engine(config: Config) -> RolloutEngine:
    """An engine of its own for the default Megatron teacher, in this process."""
    return EmbeddedEngine(embedded_spec(config, vocabulary_of(teacher_settings(config.teacher, config.model))))


def sampling_of(config: Config, vocabulary: Vocabulary) -> Sampling:
    """How training responses are drawn."""
    rollout = config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_response_tokens=rollout.max_response_tokens,
        stop_token_ids=stop_token_ids(config, vocabulary),
        # Inline teachers compare candidates with the student's in the update.
        log_prob_top_k=config.opd.log_prob_top_k if config.opd.type is OpdType.sglang else 0,
    )


def evaluation_sampling(config: Config, vocabulary: Vocabulary) -> Sampling:
    """How held-out responses are drawn."""
    return Sampling(
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
        max_response_tokens=config.eval.max_response_tokens or config.rollout.max_response_tokens,
        stop_token_ids=stop_token_ids(config, vocabulary),
    )


def stop_token_ids(config: Config, vocabulary: Vocabulary) -> tuple[int, ...]:
    """The model's end-of-sequence tokens and those of the configuration."""
    return tuple(sorted({*vocabulary.eos_token_ids, *config.rollout.stop_token_ids}))
