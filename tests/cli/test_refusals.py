"""docs/refusals.md: current, and complete."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opd_trainer import errors
from opd_trainer.cli.composition import Composer
from opd_trainer.cli.refusals import DOCUMENT, EXAMPLES, ROOT, all_refused, render

PACKAGE = ROOT / "opd_trainer"
RULES = sorted([*PACKAGE.glob("cli/rules/*.py"), *PACKAGE.glob("*/problems.py")])
"""Where rules about combinations live."""

Site = tuple[str, int, int]
"""File, first and last line of a place that makes a `Problem`."""


def sites(file: Path) -> Iterator[Site]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
            yield str(file), node.lineno, node.end_lineno or node.lineno


@dataclass(frozen=True)
class Found:
    """What the check says to every example.

    Attributes:
        problems: of each.
        made: file and line of every place that made a `Problem` meanwhile.
    """

    problems: dict[str, list[errors.Problem]]
    made: set[tuple[str, int]]


@pytest.fixture(scope="module")
def found(compose: Composer) -> Found:
    made: set[tuple[str, int]] = set()
    init = errors.Problem.__init__

    def recorded(self: errors.Problem, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<"):
            assert frame.f_back is not None
            frame = frame.f_back
        made.add((frame.f_code.co_filename, frame.f_lineno))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors.Problem, "__init__", recorded)
        return Found(all_refused(compose), made)


def test_every_rule_has_an_example(found: Found) -> None:
    wanted = [site for file in RULES for site in sites(file)]
    assert len(wanted) > 50
    missing = [
        f"{Path(file).relative_to(ROOT)}:{first}"
        for file, first, last in wanted
        if not any(file == where and first <= line <= last for where, line in found.made)
    ]
    assert not missing, (
        "these places refuse something that no command line of EXAMPLES in opd_trainer/cli/refusals.py shows; add one "
        f"for each and run python -m opd_trainer.cli.refusals: {', '.join(missing)}"
    )


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_every_example_is_refused(found: Found, example: str) -> None:
    assert found.problems[example], "the check accepts it: mend the rule, or drop it from EXAMPLES"


def test_the_page_is_up_to_date(found: Found) -> None:
    assert DOCUMENT.read_text() == render(found.problems), "run python -m opd_trainer.cli.refusals"
