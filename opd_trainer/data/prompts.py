"""Rows rendered, tokenised and given an identity.

P = tokens of a prompt.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from opd_trainer.data.config import DataConfig, MixtureData, OnBadRow
from opd_trainer.data.rows import Row, read_rows
from opd_trainer.data.skipped import Skipped, listed
from opd_trainer.errors import DataError
from opd_trainer.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class BadRow(Exception):
    """A row that cannot become a prompt; the text is the reason.

    Attributes:
        fix: what to do about it.
    """

    def __init__(self, reason: str, fix: str = "Repair the row") -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class PromptSet:
    """A dataset, ready to be asked.

    Attributes:
        name: what it is called.
        prompts: its prompts in the order of the file.
        malformed: rows left out because they could not be read or understood.
        too_long: rows left out because their prompt has too many tokens.
        weight: its share in a mixture.
        shuffle_seed: seed of its epoch shuffles.
    """

    name: str
    prompts: Sequence[Prompt]
    malformed: Sequence[Skipped] = ()
    too_long: Sequence[Skipped] = ()
    weight: float = 1.0
    shuffle_seed: int = 0

    def first(self, count: int | None) -> "PromptSet":
        """The same with its first `count` prompts; all of them where that is None."""
        return dataclasses.replace(self, prompts=self.prompts[:count])


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row between rendering and tokenisation."""

    row: Row
    text: str
    is_chat: bool
    answer: str | None
    teacher: str
    metadata: dict[str, Any]


def lookup(columns: dict[str, Any], key: str, option: str, fix: str = "") -> Any:
    """The first of the alternatives ``a|b.c`` that the row has.

    Args:
        columns: of the row.
        key: the alternatives.
        option: dotted key of the setting that named them, for messages.
        fix: what else may be done.

    Raises:
        BadRow: it has none of them.
    """
    for alternative in key.split("|"):
        value: Any = columns
        for part in alternative.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            return value
    wanted, there = (" or ".join(map(repr, key.split("|"))), ", ".join(map(repr, columns)))
    raise BadRow(f"it has no column {wanted}, only {there}", f"Set {option} to one of them{fix}, repair the row")


def conversation(value: Any, config: DataConfig, at: str) -> list[dict[str, Any]] | str:
    """The prompt as chat messages, or as text when it is no chat."""
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("its prompt is empty")
        text = value if config.prompt_template is None else config.prompt_template.replace("{prompt}", value)
        if not config.apply_chat_template:
            if config.system_prompt is not None:
                raise DataError(
                    f"{at}.system_prompt is set, but the prompts are plain text, which has no place for it. "
                    f"Set {at}.apply_chat_template=true, or write it into {at}.prompt_template"
                )
            return text
        messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    elif isinstance(value, list) and value:
        messages = [message_of(message) for message in value]
    else:
        raise BadRow(f"its prompt is a {type(value).__name__}, neither text nor a list of chat messages")
    if messages[-1]["role"] == "assistant":
        raise BadRow("its last message is the assistant's, so there is nothing left to answer")
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    return messages


def message_of(message: Any) -> dict[str, Any]:
    """One chat message, checked."""
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise BadRow(f"the chat message {str(message)[:80]} lacks a text 'role' or 'content'")
    return message


def answer_of(columns: dict[str, Any], config: DataConfig, at: str) -> str | None:
    """The reference answer as text."""
    if config.label_key is None:
        return None
    value = lookup(columns, config.label_key, f"{at}.label_key", ", or to null where there is none")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise BadRow(f"its label is {value!r}, neither text nor a number")
    return str(value)


def metadata_of(columns: dict[str, Any], config: DataConfig, at: str) -> dict[str, Any]:
    """Every column but prompt and label, and the entries of the metadata column."""
    used = {
        part for key in (config.prompt_key, config.label_key, config.metadata_key) if key for part in key.split("|")
    }
    metadata = {name: value for name, value in columns.items() if name not in used}
    if config.metadata_key is None:
        return metadata
    value = lookup(columns, config.metadata_key, f"{at}.metadata_key")
    if not isinstance(value, dict):
        raise BadRow(f"its metadata is a {type(value).__name__}, not an object")
    return metadata | value


def teacher_of(columns: dict[str, Any], config: DataConfig, at: str) -> str:
    """The name of the teacher."""
    if config.teacher_key is None:
        return config.teacher
    value = lookup(columns, config.teacher_key, f"{at}.teacher_key")
    if not isinstance(value, str) or not value:
        raise BadRow(f"its teacher is {value!r}, not a name")
    return value


def render(row: Row, config: DataConfig, tokenizer: "PreTrainedTokenizerBase", at: str) -> Rendered:
    """The row as the text that the model reads.

    Raises:
        BadRow: something of it is missing or of the wrong kind.
    """
    if row.columns is None:
        raise BadRow(row.reason)
    messages = conversation(lookup(row.columns, config.prompt_key, f"{at}.prompt_key"), config, at)
    is_chat = not isinstance(messages, str)
    text = messages if isinstance(messages, str) else apply_chat_template(messages, config, tokenizer, at)
    return Rendered(
        row=row,
        text=text,
        is_chat=is_chat,
        answer=answer_of(row.columns, config, at),
        teacher=teacher_of(row.columns, config, at),
        metadata=metadata_of(row.columns, config, at),
    )


def apply_chat_template(
    messages: list[dict[str, Any]], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", at: str
) -> str:
    """Messages as text that ends where the assistant's answer begins."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            "the prompts are chat messages, but the tokenizer has no chat template. "
            f"Set {at}.apply_chat_template=false if they are text, or model.huggingface to a folder whose tokenizer "
            "has a template"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config.chat_template_kwargs
        )
    except TemplateError as error:
        raise BadRow(f"the chat template refuses it ({error})") from error
    assert isinstance(text, str)
    return text


def identity(name: str, rendered: Rendered) -> str:
    """A name that changes with dataset, row number or content, and with nothing else."""
    content = json.dumps([rendered.text, rendered.answer], ensure_ascii=False)
    return f"{name}:{rendered.row.number}:{hashlib.blake2b(content.encode(), digest_size=6).hexdigest()}"


def tokenize(rendered: Sequence[Rendered], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids; a chat template has written its special tokens itself, plain text gets the tokenizer's."""
    ids: list[list[int]] = [[] for _ in rendered]
    for is_chat in (False, True):
        chosen = [index for index, row in enumerate(rendered) if row.is_chat is is_chat]
        if chosen:
            texts = [rendered[index].text for index in chosen]
            encoded = tokenizer(texts, add_special_tokens=not is_chat, return_attention_mask=False)["input_ids"]
            for index, row_ids in zip(chosen, encoded, strict=True):
                ids[index] = row_ids
    return ids


def load_prompts(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, name: str, max_prompt_tokens: int, at: str = "data"
) -> PromptSet:
    """Reads, renders and tokenises one dataset.

    Args:
        config: which rows, and how they are rendered.
        tokenizer: of the student; its chat template renders conversations.
        name: of the dataset; part of the prompts' ids.
        max_prompt_tokens: longest prompt, tokens.
        at: its dotted key, for messages.

    Raises:
        DataError: a row is malformed or too long and must not be skipped, or no row is left.
    """
    rendered, malformed = render_all(read_rows(config, name, at), config, tokenizer, at)
    kept: list[Prompt] = []
    too_long: list[Skipped] = []
    for row, ids in zip(rendered, tokenize(rendered, tokenizer), strict=True):
        if not ids:
            malformed.append(refuse(row.row, BadRow("its prompt has no tokens"), config.on_bad_row, f"{at}.on_bad_row"))
        elif len(ids) > max_prompt_tokens:
            reason = f"its prompt has {len(ids)} tokens, more than rollout.max_prompt_tokens={max_prompt_tokens}"
            bad = BadRow(reason, f"Raise rollout.max_prompt_tokens to {len(ids)}, shorten the prompt")
            too_long.append(refuse(row.row, bad, config.on_long_prompt, f"{at}.on_long_prompt"))
        else:
            kept.append(
                Prompt(
                    id=identity(name, row),
                    tokens=torch.tensor(ids, dtype=torch.int64),
                    text=row.text,
                    answer=row.answer,
                    dataset=name,
                    teacher=row.teacher,
                    metadata=row.metadata,
                )
            )
    for kind, skipped in (("malformed", malformed), ("too long", too_long)):
        if skipped:
            log.warning("%s: %d rows skipped (%s): %s", name, len(skipped), kind, listed(skipped))
    if not kept:
        examples = f": {listed([*malformed, *too_long])}" if malformed or too_long else ""
        raise DataError(
            f"{name}: {config.path} gives not a single prompt (offset {config.offset}){examples}. "
            f"Set {at}.path, {at}.offset and {at}.n_rows to rows that can be used"
        )
    return PromptSet(name, kept, malformed, too_long, config.weight, config.shuffle_seed)


def render_all(
    rows: Iterable[Row], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", at: str
) -> tuple[list[Rendered], list[Skipped]]:
    """Every row rendered, and those that could not be."""
    rendered: list[Rendered] = []
    malformed: list[Skipped] = []
    for row in rows:
        try:
            rendered.append(render(row, config, tokenizer, at))
        except BadRow as bad:
            malformed.append(refuse(row, bad, config.on_bad_row, f"{at}.on_bad_row"))
    return rendered, malformed


def refuse(row: Row, bad: BadRow, policy: OnBadRow, key: str) -> Skipped:
    """A record of a row left out, or the error that stops the run."""
    if policy is OnBadRow.error:
        raise DataError(f"{row.place}: {bad}. {bad.fix}, or set {key}=skip to leave such rows out")
    return Skipped(row.place, str(bad))


def load_training_sets(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, max_prompt_tokens: int
) -> list[PromptSet]:
    """The dataset of a run, or the datasets of a mixture."""
    if not isinstance(config, MixtureData):
        return [load_prompts(config, tokenizer, name="train", max_prompt_tokens=max_prompt_tokens)]
    return [
        load_prompts(dataset, tokenizer, name=name, max_prompt_tokens=max_prompt_tokens, at=f"data.datasets.{name}")
        for name, dataset in config.datasets.items()
    ]


def check_disjoint(train: Sequence[PromptSet], held_out: Sequence[PromptSet]) -> None:
    """Refuses held-out prompts that are also trained on.

    Raises:
        DataError: a prompt's text is in both.
    """
    trained = {prompt.text: prompt.id for prompts in train for prompt in prompts.prompts}
    for prompts in held_out:
        common = [prompt for prompt in prompts.prompts if prompt.text in trained]
        if common:
            raise DataError(
                f"eval.datasets.{prompts.name}: {len(common)} of {len(prompts.prompts)} prompts are also trained on "
                f"(first: {common[0].id} is {trained[common[0].text]}), so its accuracy would not be that of unseen "
                "problems. Separate them with offset and n_rows of the two datasets, or set eval.allow_trained_on=true"
            )


def check_teachers(sets: Sequence[PromptSet], teachers: Collection[str]) -> None:
    """Refuses prompts whose teacher is not there.

    Raises:
        DataError: nobody would score their responses.
    """
    for prompts in sets:
        lost = [prompt for prompt in prompts.prompts if prompt.teacher not in teachers]
        if lost:
            name = lost[0].teacher
            raise DataError(
                f"{prompts.name}: {len(lost)} of {len(prompts.prompts)} prompts ask for a teacher that is not there "
                f"(first: {lost[0].id} asks for {name!r}; there are {', '.join(map(repr, teachers))}). Add it with "
                f"+teacher@teachers.{name}=resident teachers.{name}.load=DIR, or mend data.teacher or data.teacher_key"
            )
