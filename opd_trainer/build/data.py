"""Training and held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_trainer.build.roster import teachers_of
from opd_trainer.build.vocabulary import Vocabulary
from opd_trainer.config import Config
from opd_trainer.data.prompts import PromptSet, check_disjoint, check_teachers, load_prompts, load_training_sets
from opd_trainer.data.skipped import write_skipped
from opd_trainer.data.stream import PromptStream
from opd_trainer.references import Referee, Reference

SKIPPED_ROWS = "skipped_rows.jsonl"


@dataclass(frozen=True, slots=True)
class Prompts:
    """Training and held-out prompts, disjoint unless `eval.allow_trained_on`."""

    training: list[PromptSet]
    held_out: list[PromptSet]

    def stream(self, count: int, option: str) -> PromptStream:
        """The training prompts, `count` of them in a step, as the setting `option` says.

        Raises:
            DataError: a dataset has fewer prompts than its part of one step.
        """
        stream = PromptStream(self.training)
        stream.check(count, option)
        return stream

    def write_skipped(self, directory: Path) -> None:
        """Records the rows that were left out, in `skipped_rows.jsonl`."""
        sets = (*self.training, *self.held_out)
        write_skipped(directory / SKIPPED_ROWS, [(s.name, row) for s in sets for row in (*s.malformed, *s.too_long)])


def load_data(config: Config, vocabulary: Vocabulary) -> Prompts:
    """Reads every dataset.

    Raises:
        DataError: a row is malformed or asks for a teacher that is not there, a file is missing, or held-out prompts
            are trained on.
    """
    limit = config.rollout.max_prompt_tokens
    training = load_training_sets(config.data, vocabulary.tokenizer, max_prompt_tokens=limit)
    held_out = load_held_out(config, vocabulary)
    if not config.eval.allow_trained_on:
        check_disjoint(training, held_out)
    if config.opd.on:
        check_teachers([*training, *held_out], teachers_of(config))
    return Prompts(training, held_out)


def load_held_out(config: Config, vocabulary: Vocabulary) -> list[PromptSet]:
    """The held-out datasets.

    Raises:
        DataError: a row is malformed or a file is missing.
    """
    limit = config.rollout.max_prompt_tokens
    return [
        load_prompts(data, vocabulary.tokenizer, name=name, max_prompt_tokens=limit, at=f"eval.datasets.{name}").first(
            config.eval.n_prompts
        )
        for name, data in config.eval.datasets.items()
    ]


def referee(vocabulary: Vocabulary, key: str, option: str, *, is_label: bool = False) -> Referee:
    """Finds the responses in column `key`, which the option named `option` has chosen."""
    tokenizer = vocabulary.tokenizer
    return Referee(
        encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        eos_token_id=tokenizer.eos_token_id,
        key=key,
        option=option,
        is_label=is_label,
    )


def references_of(config: Config, vocabulary: Vocabulary, held_out: Sequence[PromptSet]) -> dict[str, list[Reference]]:
    """Reference responses to the held-out prompts by dataset; none unless `eval.reference_key` asks for them.

    Raises:
        DataError: a row has none.
    """
    key = config.eval.reference_key
    if key is None:
        return {}
    found = {}
    for one in held_out:
        is_label = config.eval.datasets[one.name].label_key == key
        find = referee(vocabulary, key, "eval.reference_key", is_label=is_label)
        found[one.name] = [find(prompt) for prompt in one.prompts]
    return found
