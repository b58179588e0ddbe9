import asyncio
import json
from pathlib import Path

from benchmarks.math500_grading import FORMS, grade, page, read_golds, shuffled

GOLDS = [r"\frac{14}{3}", "p - q", r"90^\circ", "1,-2", "9", r"\text{Evelyn}"]


def test_both_ways_to_keep_the_gold_answer_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(json.dumps({key: "3"}) for key in ("answer", "label")))
    assert read_golds(file) == ["3", "3"]


def test_the_page_tells_what_was_graded() -> None:
    own = {name: asyncio.run(grade(form, GOLDS, GOLDS)) for name, form in FORMS.items()}
    assert [graded.correct for graded in own.values()] == [6, 6]
    others = {1: asyncio.run(grade(next(iter(FORMS.values())), ["14/3", *shuffled(GOLDS[1:], 1)], GOLDS))}
    text = page(own, others)
    assert "| each its own | `Answer:` | 6 / 6 | 0 | 0 |" in text
    assert r"`14/3` for `\frac{14}{3}`" in text
