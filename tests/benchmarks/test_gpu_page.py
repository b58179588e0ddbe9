import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_page


@pytest.fixture
def found() -> dict[str, Any]:
    return json.loads(gpu_page.KEPT.read_text(encoding="utf-8"))


def test_the_page_is_of_the_run_that_is_kept(found: dict[str, Any]) -> None:
    """`python -m benchmarks.gpu_page` after a change."""
    assert gpu_page.PAGE.read_text(encoding="utf-8") == gpu_page.text(found)


def test_distances_are_told_in_both_directions() -> None:
    assert str(gpu_page.Line("speed", 20.0, 100.0, True, ".0f")) == "| speed | 20 | 100 | **5.00** |"
    assert str(gpu_page.Line("time", 1.4, 4 / 3)) == "| time | 1.40 | 1.33 | 1.05 |"


@pytest.mark.parametrize("section", [name for name in gpu_page.SECTIONS if name != "ceilings"])
def test_sections_that_a_run_lacks_or_that_failed_are_told(found: dict[str, Any], section: str) -> None:
    found.pop(section, None)
    assert f"* `{section}`: not measured in this run" in gpu_page.text(found)
    found[section] = {"error": "OutOfMemoryError: CUDA out of memory"}
    assert f"* `{section}`: failed, OutOfMemoryError: CUDA out of memory" in gpu_page.text(found)


def test_a_run_is_kept_with_what_is_known_of_it(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_page, "KEPT", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu_page, "PAGE", tmp_path / "gpu.md")
    found["card"] |= {"date": "2026-01-02", "commit": None}
    run = tmp_path / "run.json"
    run.write_text(json.dumps(found), encoding="utf-8")
    gpu_page.main(["--take", str(run), "--date", "2020-01-01", "--commit", "0123456789abcdef"])
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "* Date: 2026-01-02" in page
    assert "* Code: commit 0123456789ab\n" in page


def test_a_run_of_a_part_keeps_the_rest_and_says_where_it_is_from(found: dict[str, Any]) -> None:
    new = {"card": found["card"] | {"date": "2030-01-02", "commit": "f" * 40}, "ceilings": found["ceilings"]}
    new |= {"bare_loop": {"speed_of_bare_loop": 0.5}, "log_probs": {"error": "OutOfMemoryError"}}
    both = gpu_page.together({key: value for key, value in found.items() if key != "earlier"}, new)
    assert both["bare_loop"] == {"speed_of_bare_loop": 0.5}
    assert both["rollout"] == found["rollout"]
    assert {"rollout", "log_probs"} <= set(both["earlier"])
    page = gpu_page.text(both)
    assert "* Date: 2030-01-02" in page
    assert f"* From an earlier run, `rollout`: {found['card']['date']}" in page
    with pytest.raises(ValueError, match="cannot be put into one table"):
        gpu_page.together(found, new | {"card": new["card"] | {"name": "another"}})
