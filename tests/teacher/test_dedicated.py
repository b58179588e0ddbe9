"""Teachers on workers of their own: samples that land one by one, and what becomes of errors."""

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_trainer.errors import OpdError, TeacherError
from opd_trainer.teacher import config as placements
from opd_trainer.teacher.dedicated import DedicatedTeacher
from opd_trainer.types import Finish, Sample, Scores, TokenBatch
from tests.teacher.placements import TEMPERATURE, batch_of, run, samples_of, with_dedicated

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.*is deprecated:FutureWarning"),
]


def test_a_dedicated_score_does_not_depend_on_what_arrives_with_it(folders: Any) -> None:
    batch = batch_of()
    samples = samples_of(batch)
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> tuple[list[Sample], list[Sample], dict[str, float]]:
        together = await asyncio.gather(*(dedicated.score(sample) for sample in samples))
        metrics = dedicated.metrics().values()
        return together, [await dedicated.score(sample) for sample in samples], metrics

    together, alone, metrics = run(with_dedicated(folders["student"], teacher, ask))
    assert metrics["perf/dedicated_teacher_samples_per_call"] == sum(len(s.response) > 0 for s in samples)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.teacher_log_probs, b.teacher_log_probs)
        assert a.teacher_log_probs.shape == a.response.shape


def test_a_dedicated_teacher_scores_while_responses_still_arrive() -> None:
    first, second, third = (sample for sample in samples_of(batch_of())[2:5])
    log: list[str] = []
    all_landed = asyncio.Event()

    class Slow:
        """A scorer that takes its time."""

        async def score(self, batch: TokenBatch) -> Tensor:
            log.append(f"scoring {batch.num_sequences}")
            await all_landed.wait()
            log.append("scored")
            return torch.where(batch.mask, -1.0, torch.nan)

    async def work() -> list[Sample]:
        dedicated = DedicatedTeacher(Slow(), None, temperature=1.0, name="default")  # type: ignore[arg-type]
        judging = []
        for sample in (first, second, third):
            log.append("landed")
            judging.append(asyncio.create_task(dedicated.score(sample)))
            # Whatever can begin begins.
            for _ in range(20):
                await asyncio.sleep(0)
        all_landed.set()
        return await asyncio.gather(*judging)

    judged = run(work())
    assert log == ["landed", "scoring 1", "landed", "landed", "scored", "scoring 2", "scored"]
    for sample in judged:
        assert torch.equal(sample.teacher_log_probs, torch.full((len(sample.response),), -1.0))


def test_a_dedicated_teacher_leaves_other_samples_alone(folders: Any) -> None:
    other, aborted = samples_of(batch_of(), "maths")[0], samples_of(batch_of())[0].replace(finish=Finish.abort)
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> list[Sample]:
        return [await dedicated.score(sample) for sample in (other, aborted)]

    assert run(with_dedicated(folders["student"], teacher, ask)) == [other, aborted]


def test_a_dedicated_teacher_that_fails_tells_everybody_who_waits(folders: Any) -> None:
    samples = [sample for sample in samples_of(batch_of()) if len(sample.response)]
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> list[Any]:
        await dedicated.close()
        return await asyncio.gather(*(dedicated.score(sample) for sample in samples), return_exceptions=True)

    errors = run(with_dedicated(folders["student"], teacher, ask))
    assert len(errors) == len(samples)
    assert all(isinstance(error, OpdError) for error in errors)


def test_a_dedicated_teacher_never_passes_on_what_is_not_finite(folders: Any) -> None:
    sample = samples_of(batch_of())[0]
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> None:
        worker = dedicated._scorer._shards.group.worker  # type: ignore[attr-defined]
        with torch.no_grad():
            next(worker._model.model.modules[0].parameters()).fill_(torch.nan)
        await dedicated.score(sample)

    with pytest.raises(TeacherError, match="no finite log-prob"):
        run(with_dedicated(folders["student"], teacher, ask))


def test_scores_carry_their_temperature(folders: Any) -> None:
    from opd_trainer.collation import collate
    from opd_trainer.errors import Incomparable

    batch = batch_of()
    teacher = placements.DedicatedTeacher(load=str(folders["teacher"]))

    async def ask(dedicated: DedicatedTeacher) -> list[Sample]:
        return await asyncio.gather(*(dedicated.score(sample) for sample in samples_of(batch)))

    judged = run(with_dedicated(folders["student"], teacher, ask))
    collated = collate(judged, TEMPERATURE)
    assert collated.teacher is not None
    assert collated.teacher.temperature == TEMPERATURE
    collated.rollout.check_comparable(collated.teacher)
    with pytest.raises(Incomparable):
        collate([judged[0], judged[2].replace(teacher_temperature=1.0)], TEMPERATURE)
    hot = Scores(log_probs=collated.rollout.log_probs, temperature=1.0, model="student")
    with pytest.raises(Incomparable):
        hot.check_comparable(collated.teacher)
