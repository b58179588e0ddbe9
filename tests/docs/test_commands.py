"""Every command line of `launch.py` that a page shows is one that is accepted, in a folder that has what it names."""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from opd_trainer.cli.aliases import expand
from opd_trainer.cli.composition import Composer
from opd_trainer.cli.plan import read
from opd_trainer.cli.refusals import MODEL
from tests.commands import CONF, planned

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"refusals.md", "extending.md"}
"""Pages about command lines that are wrong, and about options that are not there yet; others are made from runs."""
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in ELSEWHERE)]
HELP = CONF / "hydra" / "help" / "opd_trainer.yaml"
LAUNCH = "python launch.py"
BEGINS = re.compile(rf"(?:\$ )?{LAUNCH}\b|    [+\w.@]+=\S")
"""A command, or in an indented block its overrides alone."""


REST = {"task=convert": ["task.source=DIR", "task.target=NEW"], "-m": ["steps=5,6"]}
"""What "..." stands for in a command with this in it; nothing elsewhere, which is the demo."""


def shown(page: Path) -> Iterator[str]:
    """Arguments of the commands in the blocks and in the running text of a page."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if BEGINS.match(line) or line.strip().startswith(LAUNCH):
            yield line.partition(LAUNCH)[2] if LAUNCH in line else line
    for quoted in re.findall(rf"(?<!`)`[^`\n]*{LAUNCH}([^`\n]*)`(?!`)", text):
        yield quoted.partition(")")[0]


def helped() -> Iterator[str]:
    """Arguments of the examples of `--help`, which have a word of explanation behind them."""
    for line in yaml.safe_load(HELP.read_text())["template"].split("EXAMPLES")[1].split("GROUPS")[0].splitlines():
        words = line.partition(LAUNCH)[2].split()
        yield " ".join(takewhile(lambda word: re.search(r"=|^-|^job$|^\.\.\.$", word), words))


def arguments(command: str) -> list[str]:
    """As the shell gives them, with something in the place of dots."""
    given = shlex.split(command, comments=True)
    rest = next((words for sign, words in REST.items() if sign in given), [])
    return [word for argument in given for word in (rest if argument == "..." else [argument])]


COMMANDS = [
    pytest.param(arguments(command), id=f"{page.stem}: {' '.join(command.split())}")
    for page, found in [*((page, shown(page)) for page in PAGES), (HELP, helped())]
    for command in dict.fromkeys(found)
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands name; DIR is whatever is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("STUDENT", "TEACHER", "DIR"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "DIR" / "sweep.json").write_text(json.dumps({"trials": [], "launch": []}))
    for name in ("train.jsonl", "test.jsonl", "math-500.jsonl", "FILE.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "rewards.py").write_text("def brief(sample): ...")


def test_commands_are_found() -> None:
    pages = {str(command.id).partition(":")[0] for command in COMMANDS}
    assert {"README", "checkpoints", "data_and_rewards", "moving", "slurm", "sglang", "sweeps", HELP.stem} <= pages


@pytest.mark.parametrize("argv", COMMANDS)
def test_a_command_is_accepted(compose: Composer, argv: list[str]) -> None:
    command = read(expand(argv).argv, CONF)
    if command.composes and not command.completes:
        planned(compose, argv)
