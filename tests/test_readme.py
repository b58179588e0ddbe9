import re
from pathlib import Path

from opd_trainer.cli.aliases import KEYS, SWITCH

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_groups_is_that_of_conf() -> None:
    table = README.split("<!-- GROUPS -->")[1].split("<!-- /GROUPS -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, flags=re.MULTILINE)
    told = {group: set(re.findall(r"`(\w+)`", options)) - {"null"} for group, options in rows}
    there = {
        folder.name: {option.stem for option in folder.glob("*.yaml")}
        for folder in (ROOT / "conf").iterdir()
        if folder.is_dir() and folder.name != "hydra"
    }
    assert told == there


def test_every_flag_of_slime_that_we_accept_is_told() -> None:
    flags = re.findall(r"--([a-z][a-z-]+)", README.split("## Coming from slime")[1].split("## How it works")[0])
    assert {flag.replace("-", "_") for flag in flags} == {*KEYS, SWITCH}


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
