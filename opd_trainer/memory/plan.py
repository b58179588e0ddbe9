"""What is in memory, process by process and phase by phase. Arithmetic only."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto

from opd_trainer.megatron.attention import SHORT
from opd_trainer.megatron.config import MegatronConfig, Placement
from opd_trainer.megatron.memory import (
    BYTES,
    FP32,
    LocalSize,
    activations,
    gradient_bytes,
    local_size,
    logits_bytes,
    optimizer_bytes,
    passing_bytes,
)
from opd_trainer.memory.job import Apart, Engine, Job, Part
from opd_trainer.model.config import Dtype
from opd_trainer.rollout.config import RolloutMode
from opd_trainer.rollout.embedded.generation import slots_needed


class Phase(StrEnum):
    """The parts of a step, after the start."""

    load = auto()
    rollout = auto()
    score = auto()
    update = auto()
    sync = auto()
    save = auto()


ALL = frozenset(Phase)
AFTER_LOAD = ALL - {Phase.load}
DRAW_COPIES = 4
"""fp32 copies of the logits that drawing a token makes."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory in each process of a site.

    Attributes:
        name: for people.
        phases: when it is there.
        device: bytes on the device.
        host: bytes on the host, where the two differ.
    """

    name: str
    phases: frozenset[Phase]
    device: int = 0
    host: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """A kind of process.

    Attributes:
        name: for people.
        processes: how many there are.
        items: what each of them holds; on the fullest pipeline stage.
    """

    name: str
    processes: int
    items: tuple[Item, ...]

    def device(self, phase: Phase) -> int:
        """Bytes on the device of each process."""
        return sum(item.device for item in self.items if phase in item.phases)

    def host(self, phase: Phase) -> int:
        """Bytes on the host of each process."""
        return sum(item.host for item in self.items if phase in item.phases)

    @property
    def fullest(self) -> Phase:
        """The phase that needs most of the device."""
        return max(Phase, key=self.device)


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole job.

    Attributes:
        sites: kinds of processes.
        gpu: whether devices have memory of their own.
    """

    sites: tuple[Site, ...]
    gpu: bool

    def host(self, phase: Phase) -> int:
        """Bytes of host memory of all processes; without GPUs the devices' are there too."""
        return sum(site.processes * (site.host(phase) + (0 if self.gpu else site.device(phase))) for site in self.sites)

    @property
    def fullest(self) -> Phase:
        """The phase that needs most of the host."""
        return max(Phase, key=self.host)


def plan(job: Job, *, gpu: bool) -> Plan:
    """Plans a job.

    Args:
        job: what is run.
        gpu: whether there are GPUs.
    """
    stages = [
        Site("training", job.workers, tuple(_training(job, stage, gpu=gpu)))
        for stage in range(job.layout.pipeline_parallel)
    ]
    sites = [max(stages, key=lambda site: site.device(site.fullest))]
    engine = job.engine
    if engine is not None and engine.workers:
        sites.append(
            Site("rollout", engine.workers, tuple(_engine(engine, job.student, job.longest, "engine", gpu=gpu)))
        )
    sites += [_apart(teacher, job, gpu=gpu) for teacher in job.apart]
    if engine is not None and job.judged is not None and not job.shares_process:
        once = frozenset({Phase.rollout})
        items = _engine(engine, job.judged, job.longest, "teacher's engine, once", once, gpu=gpu)
        sites.append(Site("controller", 1, tuple(items)))
    return Plan(tuple(sites), gpu)


def micro_batch_tokens(layout: MegatronConfig, longest: int, step_tokens: int, workers: int) -> int:
    """Tokens of the fullest micro-batch on one rank: the budget, or one sequence that is longer, or all there are."""
    ranks = layout.context_parallel
    replicas = max(1, workers // (layout.tensor_parallel * layout.pipeline_parallel * ranks))
    there = max(longest, -(-step_tokens // replicas))
    return min(max(layout.max_tokens_per_device, -(-longest // ranks)), -(-there // ranks))


def _training(job: Job, stage: int, *, gpu: bool) -> Iterator[Item]:
    layout, last = job.layout, stage == job.layout.pipeline_parallel - 1
    tokens = micro_batch_tokens(layout, job.longest, job.step_tokens, job.workers)
    trained = [("student", job.student)] + ([("critic", job.critic)] if job.critic else [])
    sizes = {name: local_size(part.architecture, layout, stage) for name, part in trained}
    states = 0
    for name, part in trained:
        size = sizes[name]
        weights = size.total * BYTES[part.dtype]
        state = optimizer_bytes(size, part.dtype, layout, job.workers)
        states = states + weights + state if job.saves_behind else max(states, weights + state)
        yield Item(f"{name}: weights", ALL, weights)
        if job.trains:
            yield Item(f"{name}: gradients", ALL, gradient_bytes(size))
            yield Item(f"{name}: optimizer, main parameters", ALL, state)
    yield from _beside(job, stage)
    if job.trains:
        peaks = [_update_bytes(part, job, tokens, stage, size=sizes[name], gpu=gpu) for name, part in trained]
        yield Item("activations (estimate)", frozenset({Phase.update}), max(peak.activations for peak in peaks))
        yield Item("logits and their gradient", frozenset({Phase.update}), max(peak.logits for peak in peaks))
    if last and job.held_tokens:
        yield Item("teacher: hidden states of its distributions", frozenset({Phase.update}), _held_bytes(job))
    scored = [job.student, *job.frozen, *([job.critic] if job.critic else [])]
    passing = max(
        passing_bytes(part.architecture, layout, tokens, part.dtype)
        + (logits_bytes(part.architecture, layout, tokens, part.dtype, gradient=False) if last else 0)
        for part in scored
    )
    yield Item("activations, logits (estimate)", frozenset({Phase.score}), passing)
    whole = max(_largest_whole(job.student), min(job.bucket_bytes, _whole(job.student)))
    yield Item("weights on their way", frozenset({Phase.sync}), whole, whole if gpu else 0)
    if job.trains and job.saves_behind:
        yield Item("copy that is written", AFTER_LOAD, 0, states)
    elif job.trains:
        yield Item("what is written", frozenset({Phase.save}), 0, states if gpu else 0)
    if job.engine is not None and job.shares_process:
        yield from _engine(job.engine, job.student, job.longest, "engine", gpu=gpu)
        if job.judged is not None:
            once = frozenset({Phase.rollout})
            yield from _engine(job.engine, job.judged, job.longest, "teacher's engine, once", once, gpu=gpu)


def _beside(job: Job, stage: int) -> Iterator[Item]:
    """Teachers and the reference: on the device, or on the host and the largest of them on the device."""
    moving, largest = 0, 0
    for model in job.frozen:
        size = local_size(model.architecture, job.layout, stage)
        weights = size.total * BYTES[model.dtype]
        if model.placement is Placement.resident:
            yield Item(f"{model.name}: weights", ALL, weights)
            continue
        yield Item(f"{model.name}: weights on the host", ALL, 0, weights)
        largest = max(largest, weights)
        moving = max(moving, weights if model.placement is Placement.offload else size.largest * BYTES[model.dtype])
    if largest:
        yield Item("a model from its file to the host", frozenset({Phase.load}), largest)
        yield Item("weights of the model that scores", frozenset({Phase.score}), moving)


def _held_bytes(job: Job) -> int:
    """Hidden states that resident teachers keep of all micro-batches of a rank, which are scored before the first of
    them trains; every tensor-parallel rank has whole ones."""
    ranks = max(1, job.workers // (job.layout.tensor_parallel * job.layout.pipeline_parallel))
    widths = [
        model.architecture.hidden_size * BYTES[model.dtype]
        for model in job.frozen
        if model.placement is Placement.resident
    ]
    return -(-job.held_tokens // ranks) * max(widths, default=0)


@dataclass(frozen=True, slots=True)
class _Update:
    activations: int
    logits: int


def _update_bytes(part: Part, job: Job, tokens: int, stage: int, *, size: LocalSize, gpu: bool) -> _Update:
    """The peak of a training pass, or of the optimizer step after it where that is higher."""
    layout, last = job.layout, stage == job.layout.pipeline_parallel - 1
    short = 0 if gpu else min(job.longest, SHORT)
    varlen = gpu and part.dtype is not Dtype.float32
    keys = None if varlen else short
    peak = activations(part.architecture, layout, tokens, part.dtype, stage, short_keys=keys).peak
    # Autograd makes the gradient of a matrix before it is added to the buffer.
    peak += size.largest * BYTES[part.dtype]
    logits = logits_bytes(part.architecture, layout, tokens, part.dtype, gradient=True) if last else 0
    return _Update(max(peak, size.largest * FP32 - logits), logits)


def _apart(teacher: Apart, job: Job, *, gpu: bool) -> Site:
    layout = teacher.layout
    tokens = micro_batch_tokens(layout, job.longest, job.step_tokens, teacher.workers)
    stages = []
    for stage in range(layout.pipeline_parallel):
        weights = local_size(teacher.architecture, layout, stage).total * BYTES[teacher.dtype]
        passing = passing_bytes(teacher.architecture, layout, tokens, teacher.dtype)
        if stage == layout.pipeline_parallel - 1:
            passing += logits_bytes(teacher.architecture, layout, tokens, teacher.dtype, gradient=False)
        # It scores while responses still arrive.
        scoring = frozenset({Phase.rollout, Phase.score})
        items = (Item("weights", ALL, weights), Item("activations, logits (estimate)", scoring, passing))
        stages.append(Site(teacher.name, teacher.workers, items))
    return max(stages, key=lambda site: site.device(site.fullest))


def _engine(
    engine: Engine, part: Part, longest: int, name: str, phases: frozenset[Phase] = AFTER_LOAD, *, gpu: bool
) -> Iterator[Item]:
    """Weights of its own, the KV cache, and what a step of prefill or decoding needs."""
    rollout, item = engine.rollout, BYTES[part.dtype]
    yield Item(f"{name}: weights", ALL if phases == AFTER_LOAD else phases, _whole(part) + _second_head(part, gpu=gpu))
    slots = slots_needed(rollout.max_prompt_tokens, rollout.max_response_tokens, waiting=True)
    rows = max(1, min(rollout.batch_size, engine.rows, rollout.kv_cache_bytes // (engine.slot_bytes * slots)))
    used = longest if rows >= engine.rows else slots
    yield Item(f"{name}: KV cache", phases, rows * used * engine.slot_bytes)
    shape = part.architecture
    experts = shape.experts
    feed_forward = shape.intermediate_size if experts is None else experts.intermediate_size * experts.per_token
    wide = (4 * shape.hidden_size + 3 * feed_forward + 4 * shape.num_heads * shape.head_dim) * item
    prefill = max(rollout.prefill_tokens, rollout.max_prompt_tokens)
    prefill = min(prefill, engine.rows * rollout.max_prompt_tokens) * wide
    drawing = rows * shape.vocab_size * FP32 * DRAW_COPIES
    # One step off, the engine generates while the student learns.
    busy = {Phase.rollout} if rollout.mode is RolloutMode.sync else {Phase.rollout, Phase.score, Phase.update}
    yield Item(f"{name}: prefill or logits (estimate)", frozenset(busy), max(prefill, drawing))


def _whole(part: Part) -> int:
    """Bytes of the weights of a model that is not cut."""
    return local_size(part.architecture, MegatronConfig()).total * BYTES[part.dtype]


def _second_head(part: Part, *, gpu: bool) -> int:
    """Bytes of a tied head that an engine arranges for itself, beside the embedding (`rollout.embedded.projection`)."""
    shape = part.architecture
    twice = shape.tie_embeddings and part.dtype is Dtype.bfloat16 and not gpu
    return shape.vocab_size * shape.hidden_size * BYTES[part.dtype] if twice else 0


def _largest_whole(part: Part) -> int:
    return local_size(part.architecture, MegatronConfig()).largest * BYTES[part.dtype]
