import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from opd_trainer.errors import PreflightError
from opd_trainer.model.identity import profile
from opd_trainer.sglang.fake_model import TableModel
from opd_trainer.sglang.fleet import Fleet
from opd_trainer.teacher.config import SglangExternalTeacher
from opd_trainer.teacher.preflight import ServerFacts, Student
from opd_trainer.teacher.sglang import SglangTeacher
from tests.sglang.models import save_tiny
from tests.sglang.serving import fake

Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 300))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("student"), 1)


class Knowing(TableModel):
    """Is almost sure that token 5 follows 5."""

    def __init__(self) -> None:
        super().__init__(64)
        self.table[5, 5] = 20.0


def student(folder: Path, **changes: Any) -> Student:
    settings = {"profile": profile(folder, folder), "probes": [[5, 5, 5, 5]], "max_tokens": 100, "temperature": 1.0}
    return Student(**{**settings, **changes})


async def examined(
    who: Student, urls: list[str] | None = None, *, name: str = "default", **state: Any
) -> tuple[ServerFacts, float]:
    async with fake(**{"make_model": Knowing, **state}) as server:
        config = SglangExternalTeacher(timeout_s=100.0, attempts=1)
        teacher = SglangTeacher(config, Fleet(urls or [server.url]), who, name=name)
        await teacher.start()
        try:
            return await teacher.preflight(), teacher.temperature
        finally:
            await teacher.close()


def test_a_good_teacher(folder: Path) -> None:
    facts, temperature = run(examined(student(folder), model_path=str(folder)))
    assert facts.max_length == 4096
    assert facts.ignores_temperature
    assert facts.mean_log_prob > -0.1
    assert temperature == 1.0


def test_a_server_that_honours_temperature_is_asked_at_the_students(folder: Path) -> None:
    facts, temperature = run(
        examined(student(folder, temperature=0.7, probes=[[5, 5, 9, 8]]), honour_temperature=True, make_model=Sharp)
    )
    assert not facts.ignores_temperature
    assert temperature == 0.7


class Sharp(TableModel):
    """Surely 5 after 5, else anything; not so sure that a temperature would not show."""

    def __init__(self) -> None:
        super().__init__(64)
        self.table[5, 5], self.table[5, 9], self.table[9, 8] = 6.0, 6.5, 6.0


def test_everything_wrong_is_reported_together(folder: Path) -> None:
    bad = student(folder, max_tokens=4096, temperature=0.7, probes=[[3, 4, 9, 8]])
    with pytest.raises(PreflightError) as caught:
        run(examined(bad, make_model=Uniform))
    message = str(caught.value)
    for part in ("3 problems", "context of 4096 tokens", "rollout.temperature: 0.7", "uniform guess"):
        assert part in message


class Uniform(TableModel):
    """A teacher whose weights were lost."""

    def __init__(self) -> None:
        super().__init__(64)
        self.table.zero_()


class Opinionated(TableModel):
    """Sure of itself, and wrong about the prompts: it learned responses."""

    def __init__(self) -> None:
        super().__init__(64)
        self.table[:, 7] = 15.0


def test_a_teacher_that_knows_nothing_of_prompts_may_know_responses(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, _ = run(examined(student(folder), make_model=Opinionated))
    assert facts.mean_log_prob < -10
    assert "learned responses alone" in facts.remarks[-1]
    assert "learned responses alone" in capsys.readouterr().out


class Untrained(TableModel):
    """Fresh weights: about uniform."""

    def __init__(self) -> None:
        super().__init__(64)
        self.table *= 0.6


def test_random_weights_are_refused(folder: Path) -> None:
    with pytest.raises(PreflightError, match="uniform guess"):
        run(examined(student(folder, probes=[list(range(2, 40))]), make_model=Untrained))


def test_an_unreachable_server(folder: Path) -> None:
    with pytest.raises(PreflightError, match=r"teacher.url: http://127.0.0.1:9 does not answer"):
        run(examined(student(folder), ["http://127.0.0.1:9"]))


def test_another_teacher_is_named_by_its_own_keys(folder: Path) -> None:
    with pytest.raises(PreflightError, match=r"1\. teachers\.maths\.url: .* set teachers\.maths\.url to one that runs"):
        run(examined(student(folder), ["http://127.0.0.1:9"], name="maths"))
    with pytest.raises(PreflightError, match=r"1\. teachers\.maths: .*set teachers\.maths\.check_trained=false"):
        run(examined(student(folder, probes=[list(range(2, 40))]), make_model=Untrained, name="maths"))


def test_an_older_server_with_older_names_is_understood(folder: Path) -> None:
    assert run(examined(student(folder), sessions=False))[0].max_length == 4096


@pytest.mark.parametrize("parts", [False, True], ids=["text alone", "a model of several parts"])
def test_a_smaller_vocabulary_is_refused_without_sending_its_tokens(folder: Path, tmp_path: Path, parts: bool) -> None:
    """SGLang dies of a token id that it does not have; the folder tells beforehand."""
    small = save_tiny(tmp_path / "small", 1)
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 8}
    (small / "config.json").write_text(json.dumps({"text_config": config} if parts else config))
    with pytest.raises(PreflightError, match="a vocabulary of 8"):
        run(examined(student(folder), model_path=str(small)))


def test_a_folder_that_does_not_tell_is_not_compared(folder: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", 1)
    (other / "config.json").write_text("{}")
    facts, _ = run(examined(student(folder), model_path=str(other)))
    assert "says nothing of max_position_embeddings" in " ".join(facts.remarks)
