"""Hydra's shell completion behind our spellings: what it could not read of a half-written line, it is not shown."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opd_trainer.cli.aliases import expand
from opd_trainer.cli.check import check, group_problem, is_hydras, parse_all, without_nulls
from opd_trainer.cli.composition import Composer

LINE = "COMP_LINE"
"""Environment variable with the line that the user is writing; set by the shell."""
PROGRAM = "python launch.py"
PLAIN, BY_NAME = '"${words[0]}" == "python"', '"${words[0]##*/}" == "python"'
"""How Hydra's function for bash knows Python, and how ours does: bash calls it for .venv/bin/python as well."""


def settled(composer: Composer, words: Sequence[str]) -> list[str]:
    """The overrides that decide which groups and keys there are, in Hydra's spelling.

    Words that are wrong, and those with several values, are left out: the check of the finished line explains them.
    """
    texts = [word for word in expand(words).argv if not word.startswith("-")]
    parsed = [override for override in parse_all(composer, texts)[0] if not override.is_sweep_override()]
    chosen = [o for o in parsed if composer.is_group(o.key_or_group) and not is_hydras(o)]
    right = [override for override in chosen if group_problem(composer, override) is None]
    unique = {override.key_or_group: without_nulls(composer, override) for override in right}
    # A key below a dataset that is not there yet (`eval.datasets.math.path=x`) brings it into being.
    return [*unique.values(), *check(composer, [override.input_line or "" for override in parsed]).mounts]


def hydras_line(composer: Composer, line: str) -> str:
    """The line as Hydra's completion can take it: the word at its end untouched, the ones before it settled."""
    words = line.split()
    start = next((number for number, word in enumerate(words, 1) if word.endswith(".py")), len(words))
    given = words[start:]
    begins_a_word = line[-1:].isspace()
    before, last = (given, "") if begins_a_word or not given else (given[:-1], given[-1])
    return " ".join([PROGRAM, *settled(composer, before), last])


def for_any_python(script: str) -> str:
    """What Hydra wants the shell to run, without its mistake about Pythons that are named by a path."""
    return script.replace(PLAIN, BY_NAME)


@contextmanager
def asked_about(line: str) -> Iterator[None]:
    """The shell's line is this one, inside."""
    before = os.environ[LINE]
    os.environ[LINE] = line
    try:
        yield
    finally:
        os.environ[LINE] = before
