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
