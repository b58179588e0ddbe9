"""What docs/data_and_rewards.md shows is so."""

import asyncio
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from opd_trainer.reward.config import CustomReward
from opd_trainer.reward.custom import Custom
from opd_trainer.reward.equality import same_answer

PAGE = (Path(__file__).parents[2] / "docs" / "data_and_rewards.md").read_text(encoding="utf-8")


def test_the_custom_reward(make_sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("documented")
    exec(PAGE.split("```python\n")[1].split("```")[0], module.__dict__)
    monkeypatch.setitem(sys.modules, "documented", module)

    async def ask() -> dict[str, float]:
        return await Custom(CustomReward(path="documented:brief"))(make_sample("is 12", "12"), 1)

    parts = asyncio.run(ask())
    assert parts == pytest.approx({"reward": 0.995, "right": 1.0, "cost": 0.005})


def test_the_table_of_answers() -> None:
    rows = re.findall(
        r"^\| (`.+) \| (`.+) \|$", PAGE.split("### What counts")[1].split("## Evaluation")[0], flags=re.MULTILINE
    )
    assert len(rows) == 14
    for same, different in rows:
        first, *others = re.findall(r"`([^`]+)`", same)
        assert all(same_answer(other, first) for other in others), same
        one, other = re.findall(r"`([^`]+)`", different)
        assert not same_answer(one, other), different
