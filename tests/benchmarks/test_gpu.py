import json
from pathlib import Path
from typing import Any

from benchmarks import gpu, gpu_page


def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    found = gpu.main(["--device", "cpu", "--tiny", "--json", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(found))
    failed = {name: part["error"] for name, part in found.items() if isinstance(part, dict) and "error" in part}
    assert not failed
    assert found["update_qwen3_0_6b"]["cost_of_teacher"] > 0
    assert found["bare_loop"]["speed_of_bare_loop"] > 0
    assert [row["tokens"] for row in found["rollout"]] == [24, 36]
    assert all(row["error"] < 1e-3 for row in found["log_probs"])
    assert "## Without figures" not in page_of(found)


def page_of(found: dict[str, Any]) -> str:
    found["card"] |= {"name": "a card", "memory_gib": 1.0, "capability": "9.0", "cuda": "13.0"}
    return gpu_page.text(found)


def test_the_profile_runs_on_a_cpu() -> None:
    found = gpu.main(["--device", "cpu", "--tiny", "--only", "profile"])
    rows = found["profile"]
    assert isinstance(rows, list), rows
    assert {(row["of"], row["by"]) for row in rows} == {
        (of, by) for of in ("teacher", "update") for by in ("total", "sum", "host")
    }
    assert "Where the time of an update goes" in page_of(found)
