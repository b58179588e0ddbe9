"""Settings of a dataset that cannot work, found before any file is read."""

from collections.abc import Iterator

from opd_trainer.data.config import DataConfig, MixtureData
from opd_trainer.errors import Problem

NOT_OF_THE_TEMPLATE = frozenset(
    {
        "conversation",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""Arguments of a tokenizer's `apply_chat_template` that it keeps from the template: whoever calls it decides."""


def data_problems(config: DataConfig, at: str) -> Iterator[Problem]:
    """Everything about the settings of a dataset, and of those that it mixes, that cannot work.

    Args:
        config: an option of `data=`, or a dataset of `eval.datasets`.
        at: its dotted key.
    """
    if isinstance(config, MixtureData):
        if config.path is not None:
            what = f"{config.path!r} with a mixture"
            yield Problem(f"{at}.path", what, "it has files for each of its datasets", f"Set {at}.datasets.NAME.path")
        for name, part in config.datasets.items():
            yield from data_problems(part, f"{at}.datasets.{name}")
        return
    at_least = [("offset", config.offset, 0), ("n_rows", 1 if config.n_rows is None else config.n_rows, 1)]
    for name, value, smallest in at_least:
        if value < smallest:
            why = f"the smallest value that makes sense is {smallest}"
            yield Problem(f"{at}.{name}", f"{value}", why, f"Set {at}.{name}={smallest} or more")
    if not config.weight > 0:
        why = "a dataset of a mixture has a positive share; one without would never be asked"
        yield Problem(f"{at}.weight", f"{config.weight:g}", why, f"Set {at}.weight=1, or drop the dataset")
    for name in sorted(NOT_OF_THE_TEMPLATE.intersection(config.chat_template_kwargs)):
        key = f"{at}.chat_template_kwargs.{name}"
        why = "it says what becomes of the text, which no template looks at"
        yield Problem(key, str(config.chat_template_kwargs[name]), why, f"Drop {key}")
    if config.prompt_template is not None and "{prompt}" not in config.prompt_template:
        yield Problem(
            f"{at}.prompt_template",
            repr(config.prompt_template),
            "it has no {prompt}, so that every row would ask the same",
            f"Put {{prompt}} into {at}.prompt_template",
        )
