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


def messages() -> list[str]:
    """What the troubleshooting table quotes, in the pieces that stand between its dots."""
    table = README.split("## When something goes wrong")[1].split("## Licence")[0]
    quoted = [
        span for row in re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE) for span in re.findall("`([^`]+)`", row)
    ]
    return [piece.strip(" ,;:()") for text in quoted for piece in re.split(r"\.\.\.|: ", text) if len(piece) > 8]


def said_by_the_code() -> str:
    """The source and the page of refusals, with string literals of several lines put together."""
    files = [*(ROOT / "opd_trainer").rglob("*.py"), ROOT / "docs" / "refusals.md", ROOT / "Makefile"]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text(encoding="utf-8") for file in files))


def test_quoted_messages_are_those_of_the_code() -> None:
    source, quoted = said_by_the_code(), messages()
    assert len(quoted) > 10
    assert [piece for piece in quoted if piece not in source and not piece.startswith("make ")] == []
