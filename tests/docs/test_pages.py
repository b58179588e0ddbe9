"""Every page: links lead somewhere, and what is quoted from the code is there."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest

from opd_trainer.controller import Controller

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """Where a link into a page can lead: GitHub's names of its headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_into_pages_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    assert [f"{to}#{at}" for to, at in links if at not in anchors(page.parent / to if to else page)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path) -> None:
    """`opd_trainer/x.py`, `tests/...`, `docs/...` and `conf/...` in backticks."""
    named = re.findall(
        r"`((?:opd_trainer|tests|docs|conf|benchmarks|scripts)/[\w./-]+)`", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_quoted_loop_is_the_loop() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    quoted = page.split("```python\n")[1].split("```")[0]
    body = inspect.getsource(Controller.fit).split('"""')[2]
    assert quoted.strip() == textwrap.dedent(body).strip()


CONF = ROOT / "conf"
KEYS = set(re.findall(r"^\| `([\w.]+)` \|", (CONF / "README.md").read_text(), flags=re.MULTILINE))
ROOTS = {key.split(".")[0] for key in KEYS}
OPEN = ("eval.datasets", "data.datasets", "reward.parts", "teachers", "data.chat_template_kwargs")
"""What is below these has names of the user's."""
TOLD = [page for page in PAGES if page.name != "refusals.md"]
"""That page is about command lines that are wrong."""


def code(page: Path) -> list[str]:
    """What a page puts between backticks, and its blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [*blocks, *re.findall(r"`([^`\n]+)`", text)]


def exists(key: str) -> bool:
    return key.startswith(OPEN) or key in KEYS or any(known.startswith(f"{key}.") for known in KEYS)


@pytest.mark.parametrize("page", TOLD, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_keys_exist(page: Path) -> None:
    named = {
        key for text in code(page) for key in re.findall(r"(?<![\w./@:])([a-z_]+(?:\.[a-z_]+)+)(?=[=`\s,]|$)", text)
    }
    ours = {key for key in named if key.split(".")[0] in ROOTS and not key.endswith((".py", ".md", ".json", ".jsonl"))}
    assert sorted(key for key in ours if not exists(key)) == []


@pytest.mark.parametrize("page", TOLD, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_options_exist(page: Path) -> None:
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"hydra"}
    named = {pair for text in code(page) for pair in re.findall(r"(?<![\w./@:-])([a-z_]+)=([a-z][a-z0-9_,]*)", text)}
    # docs/extending.md adds options in its diffs.
    added = set(re.findall(r"^\+\+\+ b/conf/(\w+)/(\w+)\.yaml", page.read_text(), flags=re.MULTILINE))
    wrong = [
        f"{group}={option}"
        for group, options in named
        if group in groups
        for option in options.split(",")
        if option not in ("null", "")
        and (group, option) not in added
        and not (CONF / group / f"{option}.yaml").is_file()
    ]
    assert sorted(wrong) == []
