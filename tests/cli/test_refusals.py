"""docs/refusals.md: current, and complete."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd_trainer import errors
from opd_trainer.cli.composition import Composer
from opd_trainer.cli.refusals import DOCUMENT, EXAMPLES, ROOT, refused, render, scene

PACKAGE = ROOT / "opd_trainer"
RULES = sorted([*PACKAGE.glob("cli/rules/*.py"), *PACKAGE.glob("*/problems.py")])
"""Where rules about combinations live."""

Site = tuple[str, int, int]
"""File, first and last line of a place that makes a `Problem`."""


def sites(file: Path) -> Iterator[Site]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
            yield str(file), node.lineno, node.end_lineno or node.lineno


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, int]]:
    """File and line of every place that makes a `Problem` from now on."""
    found: set[tuple[str, int]] = set()
    init = errors.Problem.__init__

    def recorded(self: errors.Problem, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<"):
            assert frame.f_back is not None
            frame = frame.f_back
        found.add((frame.f_code.co_filename, frame.f_lineno))

    monkeypatch.setattr(errors.Problem, "__init__", recorded)
    return found


def test_every_rule_has_an_example(shared_composer: Composer, made: set[tuple[str, int]]) -> None:
    with scene():
        for examples in EXAMPLES.values():
            for example in examples:
                refused(shared_composer, example)
    wanted = [site for file in RULES for site in sites(file)]
    assert len(wanted) > 50
    missing = [
        f"{Path(file).relative_to(ROOT)}:{first}"
        for file, first, last in wanted
        if not any(file == where and first <= line <= last for where, line in made)
    ]
    assert not missing, (
        "these places refuse something that no command line of EXAMPLES in opd_trainer/cli/refusals.py shows; add one "
        f"for each and run python -m opd_trainer.cli.refusals: {', '.join(missing)}"
    )


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_every_example_is_refused(shared_composer: Composer, example: str) -> None:
    with scene():
        assert refused(shared_composer, example), "the check accepts it: mend the rule, or drop it from EXAMPLES"


def test_the_page_is_up_to_date(shared_composer: Composer) -> None:
    assert DOCUMENT.read_text() == render(shared_composer), "run python -m opd_trainer.cli.refusals"
