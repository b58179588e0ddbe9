"""Whether a plan fits, and the cheapest change that would make it fit."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from opd_trainer.errors import PreflightError
from opd_trainer.megatron.build import architecture_problems
from opd_trainer.megatron.config import Placement, Recompute
from opd_trainer.memory.capacity import Capacity
from opd_trainer.memory.job import Frozen, Job, Part
from opd_trainer.memory.plan import Phase, Plan, micro_batch_tokens, plan
from opd_trainer.model.config import Dtype

P = TypeVar("P", bound=Part)
TOGETHER = 3
"""Changes that are tried at once."""
SMALLEST_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory that a plan needs and does not get.

    Attributes:
        where: a kind of process, or the host.
        phase: of the step.
        needed: bytes.
        available: bytes.
    """

    where: str
    phase: Phase
    needed: int
    available: int


def shortages(planned: Plan, capacity: Capacity, *, device_share: float = 1.0) -> list[Shortage]:
    """Where a plan does not fit.

    Args:
        planned: the plan.
        capacity: what there is.
        device_share: of a GPU, for each process.
    """
    found = []
    if capacity.device is not None:
        room = int(capacity.device * device_share)
        found = [
            Shortage(f"each {site.name} process's GPU", site.fullest, site.device(site.fullest), room)
            for site in planned.sites
            if site.device(site.fullest) > room
        ]
    if capacity.host is not None and planned.host(planned.fullest) > capacity.host:
        found.append(Shortage("the host", planned.fullest, planned.host(planned.fullest), capacity.host))
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """Something that a user could set.

    Attributes:
        override: as it is typed.
        price: what it costs.
        job: with the change.
    """

    override: str
    price: str
    job: Job


def cheapest(job: Job, capacity: Capacity, *, device_share: float = 1.0) -> tuple[Change, ...]:
    """The fewest and, among as few, the cheapest changes that make the job fit; none when nothing tried does."""
    overrides = [change.override for change in changes(job, capacity)]
    for size in range(1, TOGETHER + 1):
        for chosen in itertools.combinations(overrides, size):
            found = _together(job, capacity, chosen)
            if found and not shortages(plan(found[-1].job, gpu=capacity.gpu), capacity, device_share=device_share):
                return found
    return ()


def _together(job: Job, capacity: Capacity, chosen: tuple[str, ...]) -> tuple[Change, ...]:
    """These changes, each on top of the one before; none where one makes another pointless or undoes it."""
    found: list[Change] = []
    if len({override.partition("=")[0] for override in chosen}) < len(chosen):
        return ()
    for override in chosen:
        change = next((candidate for candidate in changes(job, capacity) if candidate.override == override), None)
        if change is None:
            return ()
        found.append(change)
        job = change.job
    return tuple(found)


def changes(job: Job, capacity: Capacity) -> Iterator[Change]:
    """What could be set instead, cheapest first."""
    layout = job.layout
    replicas = job.workers // (layout.tensor_parallel * layout.pipeline_parallel)
    if job.trains and replicas > 1 and not layout.distributed_optimizer:
        yield _layout(job, "distributed_optimizer", True, "exchanges weights after a step")
    if job.trains and job.saves_behind:
        yield Change(
            "checkpoint.async_save=false", "waits for checkpoints", dataclasses.replace(job, saves_behind=False)
        )
    if job.engine is not None:
        yield from _smaller_cache(job)
    now = micro_batch_tokens(layout, job.longest, job.step_tokens, job.workers)
    least = max(1, -(-job.longest // layout.context_parallel))
    budget = 1 << (now - 1).bit_length() >> 1
    while budget > least:
        yield _layout(job, "max_tokens_per_device", budget, "smaller micro-batches")
        budget //= 2
    if least < now:
        yield _layout(job, "max_tokens_per_device", least, "smaller micro-batches")
    if layout.log_prob_chunk_tokens > SMALLEST_CHUNK:
        yield _layout(job, "log_prob_chunk_tokens", SMALLEST_CHUNK, "smaller kernels")
    for model in job.frozen:
        if model.placement is Placement.resident and capacity.gpu:
            yield _offload(job, model)
    if job.trains and layout.recompute is Recompute.none:
        yield _layout(job, "recompute", Recompute.selective, "about a fifth more computation")
    if job.trains and layout.recompute is not Recompute.full:
        yield _layout(job, "recompute", Recompute.full, "about a third more computation")
    if job.student.dtype is Dtype.float32:
        yield _bfloat16(job)
    yield from _more_devices(job, capacity)


def _layout(job: Job, key: str, value: Any, price: str) -> Change:
    written = str(value).lower()
    layout = dataclasses.replace(job.layout, **{key: value})
    return Change(f"megatron.{key}={written}", price, dataclasses.replace(job, layout=layout))


def _smaller_cache(job: Job) -> Iterator[Change]:
    engine = job.engine
    assert engine is not None
    rows = min(engine.rollout.batch_size, engine.rows) // 2
    while rows >= 1:
        rollout = dataclasses.replace(engine.rollout, batch_size=rows)
        smaller = dataclasses.replace(engine, rollout=rollout)
        yield Change(f"rollout.batch_size={rows}", "fewer responses at once", dataclasses.replace(job, engine=smaller))
        rows //= 4


def _offload(job: Job, model: Frozen) -> Change:
    moved = dataclasses.replace(model, placement=Placement.offload)
    frozen = tuple(moved if other is model else other for other in job.frozen)
    option = model.key if not model.key.startswith("teachers.") else f"+teacher@{model.key}"
    return Change(f"{option}=offload", "copies its weights in each step", dataclasses.replace(job, frozen=frozen))


def _bfloat16(job: Job) -> Change:
    def narrow(part: P) -> P:
        return dataclasses.replace(part, dtype=Dtype.bfloat16)

    engine = job.engine
    if engine is not None:
        engine = dataclasses.replace(engine, slot_bytes=engine.slot_bytes * 5 // 8)
    narrowed = dataclasses.replace(
        job,
        student=narrow(job.student),
        critic=None if job.critic is None else narrow(job.critic),
        frozen=tuple(narrow(model) for model in job.frozen),
        judged=None if job.judged is None else narrow(job.judged),
        engine=engine,
    )
    return Change("model.dtype=bfloat16", "rounds the weights", narrowed)


def _more_devices(job: Job, capacity: Capacity) -> Iterator[Change]:
    """Tensor parallelism over more GPUs; without them more workers share the same memory."""
    if not capacity.gpu:
        return
    layout, size = job.layout, job.layout.tensor_parallel * 2
    while size <= job.student.architecture.num_heads:
        wider = dataclasses.replace(layout, tensor_parallel=size)
        models = [job.student, *job.frozen, *([job.critic] if job.critic else [])]
        if not any(architecture_problems(model.architecture, wider, trainable=False) for model in models):
            workers = job.workers * size // layout.tensor_parallel
            engine = job.engine
            if engine is not None and not engine.workers:
                engine = dataclasses.replace(engine, workers=1)
            yield Change(
                f"megatron.tensor_parallel={size} cluster=ray cluster.num_workers={workers}",
                "more GPUs",
                dataclasses.replace(job, layout=wider, workers=workers, engine=engine, shares_process=False),
            )
        size *= 2


def refuse(job: Job, capacity: Capacity, *, device_share: float = 1.0) -> None:
    """Refuses a job that cannot fit.

    Raises:
        PreflightError: it needs more memory than there is; names the cheapest changes that would help.
    """
    found = shortages(plan(job, gpu=capacity.gpu), capacity, device_share=device_share)
    if not found:
        return
    worst = "; ".join(
        f"{shortage.where} needs {gib(shortage.needed)} during {shortage.phase}, and {gib(shortage.available)} are "
        f"{capacity.source}"
        for shortage in found
    )
    helping = cheapest(job, capacity, device_share=device_share)
    if helping:
        prices = "; ".join(change.price for change in helping)
        fix = f"It would fit with {' '.join(change.override for change in helping)} ({prices})"
    else:
        fix = "No placement, recomputation or batch size makes it fit: use a smaller model or a larger machine"
    raise PreflightError(
        f"memory: {worst}: the run would die of it. {fix}. `task=preflight` shows the whole plan; "
        f"task.check_memory=false starts anyway"
    )


def gib(number: int) -> str:
    """Bytes for people."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**27 else f"{number / 2**20:.1f} MiB"
