"""One update of the same models on the same batch in different parallel layouts, OPD on, and how far they are apart.

The step is Adam with beta1 = beta2 = 0 and an epsilon far above any gradient: a plain gradient step at rate 1,
so that the change of a weight is its gradient, whatever the layout keeps where. (A real Adam step divides by the
gradient's size and turns rounding noise into differences of the size of the learning rate.)
"""

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_trainer.loss.config import LossConfig, ReferenceConfig
from opd_trainer.loss.gspo import GspoLoss
from opd_trainer.megatron.config import Recompute
from opd_trainer.megatron.packing import Plan, merge, plan
from opd_trainer.megatron.spec import WorkerSpec
from opd_trainer.megatron.worker import MegatronWorker
from opd_trainer.model.config import Family
from opd_trainer.objective import ObjectiveLoss
from opd_trainer.opd.config import OpdConfig, OpdType, TokenWeights, WeightsConfig
from opd_trainer.teacher.config import ResidentTeacher
from opd_trainer.teacher.inline import inline_teacher
from opd_trainer.types import Scores, TokenBatch
from tests.gloo import run_gloo
from tests.megatron import training
from tests.megatron.models import hf_model, tiny

STEP = 1e6
GRADIENT_STEP = {"lr": STEP, "eps": STEP, "beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0, "clip_grad": 0.0}
TEACHERS = {"default": "teacher", "other": "student"}
"""Two of them, so that a micro-batch of one rank has nothing for one that other ranks ask."""
PROMPTS = (3, 2, 5, 1, 4, 2, 1, 7)
RESPONSES = (6, 0, 9, 4, 1, 12, 30, 2)
MAX_TOKENS = 24
"""Several micro-batches on each rank."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A parallel layout.

    Attributes:
        name: for people.
        world_size: processes.
        settings: of `MegatronConfig`.
        family: of student and teacher.
    """

    name: str
    world_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    family: Family = Family.qwen3


def _moe(name: str, world_size: int, **settings: Any) -> Layout:
    return Layout(f"moe {name}", world_size, settings, Family.qwen3_moe)


def _dense(name: str, world_size: int, **settings: Any) -> Layout:
    return Layout(name, world_size, settings)


LAYOUTS = (
    Layout(Family.qwen3.value, 1),
    Layout(Family.qwen3_moe.value, 1, family=Family.qwen3_moe),
    _dense("recompute selective", 1, recompute=Recompute.selective),
    _dense("recompute full", 1, recompute=Recompute.full),
    _moe("recompute full", 1, recompute=Recompute.full),
    _dense("tp 2", 2, tensor_parallel=2),
    _dense("tp 2, sequence parallel", 2, tensor_parallel=2, sequence_parallel=True),
    _dense("pp 2 (2 + 1 layers)", 2, pipeline_parallel=2),
    _dense("pp 2 (1 + 2 layers)", 2, pipeline_parallel=2, pipeline_layers=[1, 2], recompute=Recompute.full),
    _dense("cp 2", 2, context_parallel=2),
    _dense("dp 2", 2),
    _dense("dp 2, distributed optimizer", 2, distributed_optimizer=True),
    _moe("ep 2 (of dp 2)", 2, expert_parallel=2),
    _moe("ep 2 (of dp 2), distributed optimizer", 2, expert_parallel=2, distributed_optimizer=True),
    _moe("ep 2 (of cp 2)", 2, context_parallel=2, expert_parallel=2),
    _moe("tp 2, sequence parallel", 2, tensor_parallel=2, sequence_parallel=True),
    _moe("tp 2, ep 2 (of tp 2)", 2, tensor_parallel=2, sequence_parallel=True, expert_parallel=2),
    _dense("tp 2, pp 2", 4, tensor_parallel=2, pipeline_parallel=2),
    _dense("tp 2, cp 2, sequence parallel", 4, tensor_parallel=2, sequence_parallel=True, context_parallel=2),
    _dense("cp 2, dp 2, distributed optimizer", 4, context_parallel=2, distributed_optimizer=True),
    _moe("pp 2, ep 2 (of dp 2)", 4, pipeline_parallel=2, expert_parallel=2),
    _moe(
        "tp 2, dp 2, ep 4, sequence parallel, distributed optimizer",
        4,
        tensor_parallel=2,
        sequence_parallel=True,
        expert_parallel=4,
        distributed_optimizer=True,
    ),
)
"""One process for each family first, with which the others are compared."""


def alone(layout: Layout) -> Layout:
    """The same models in one process."""
    return next(each for each in LAYOUTS if each.name == layout.family.value)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an update gives, as the controller sees it.

    Attributes:
        loss: sum of weight * loss.
        log_probs: f32[T] live.
        entropy: f32[T].
        teacher: f32[T].
        grad_norm: global.
        flop: of all data-parallel ranks.
        weights: before the update, whole tensors by Hugging Face name.
        gradient: of them.
    """

    loss: float
    log_probs: Tensor
    entropy: Tensor
    teacher: Tensor
    grad_norm: float
    flop: int
    weights: dict[str, Tensor]
    gradient: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest absolute differences between two outcomes; that of gradients relative to the largest entry of all."""

    loss: float
    log_probs: float
    entropy: float
    teacher: float
    gradient: float

    @property
    def largest(self) -> float:
        """Of all."""
        return max(dataclasses.astuple(self))


def loss() -> ObjectiveLoss:
    """Ratios of whole sequences, token weights that depend on the tokens before, and an entropy bonus."""
    return ObjectiveLoss(
        policy=GspoLoss(eps_low=0.5, eps_high=0.5),
        opd=OpdConfig(type=OpdType.megatron, weights=WeightsConfig(kind=TokenWeights.importance)),
        kl_coef=0.5,
        reference=ReferenceConfig(),
        options=LossConfig(entropy_coef=0.01),
        temperature=1.0,
    )


def write_models(folder: Path, family: Family) -> None:
    """A student and a teacher whose attention and routing matter, which those of freshly initialised weights do not."""
    for seed, name in enumerate(("student", "teacher")):
        training.save_tokenizer(folder / name)
        vocab_size = len(training.load_tokenizer(folder / name))
        changes = {
            "num_layers": 3,
            "vocab_size": vocab_size,
            "max_length": 64,
            "tie_embeddings": family is Family.qwen3,
        }
        model = hf_model(tiny(family, **changes), seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
        model.save_pretrained(folder / name)


def spec(folder: Path, settings: dict[str, Any]) -> WorkerSpec:
    """Student and resident teachers of `write_models` in a layout."""
    changes = {"max_tokens_per_device": MAX_TOKENS, **GRADIENT_STEP, **settings}
    plain = training.spec(folder / "student", **changes)
    teachers = {
        name: inline_teacher(name, ResidentTeacher(load=str(folder / load)), plain.model, plain.megatron, 1.0)
        for name, load in TEACHERS.items()
    }
    return dataclasses.replace(plain, teachers=teachers)


def batch(folder: Path) -> TokenBatch:
    """Sequences of very different lengths; old log-probs near the live ones, so that ratios are neither 1 nor cut."""
    plain = training.batch(PROMPTS, RESPONSES)
    with training.started(training.spec(folder / "student")) as worker:
        live = worker.score([plain], "student")[0]
    noise = torch.randn(len(live), generator=torch.Generator().manual_seed(3)) * 0.1
    return plain.replace(
        teacher_name=tuple("other" if length == max(RESPONSES) else "default" for length in RESPONSES),
        old=Scores(log_probs=live + noise, temperature=1.0, model="old"),
        opd_weight=plain.mask.float(),
    )


def update(
    rank: int,
    world_size: int,
    rendezvous: str,
    work: tuple[Path, Mapping[Family, TokenBatch]],
    layouts: Sequence[Layout],
) -> bytes:
    """One rank's part of an update in each layout, on the folder of the models and the batch.

    Pickled here, because a queue would pass tensors by reference to a process that is gone.
    """
    folder, batches = work
    parts = []
    for number, layout in enumerate(layouts):
        meeting = f"{rendezvous}{number}" if world_size > 1 else training.local_rendezvous()
        worker = MegatronWorker(spec(folder / layout.family, layout.settings), rank, world_size, meeting)
        worker.start()
        try:
            place, before = worker.place(), training.weights(worker)
            whole = batches[layout.family]
            planned = _planned(whole, place.dp_size)
            result = worker.update([whole.take(list(part)) for part in planned.ranks[place.dp_rank]], loss())
            gradient = {name: before[name] - tensor for name, tensor in training.weights(worker).items()}
            parts.append((place, result, before, gradient))
        finally:
            worker.close()
    return pickle.dumps(parts)


def _planned(work: TokenBatch, dp_size: int) -> Plan:
    return plan(work.lengths.tolist(), dp_size, MAX_TOKENS)


def outcomes(folder: Path, layouts: Sequence[Layout]) -> dict[str, Outcome]:
    """An update in each layout, by name; the layouts of one world size share its processes.

    Args:
        folder: where the models are written.
        layouts: any of `LAYOUTS`.
    """
    batches = {}
    for family in dict.fromkeys(layout.family for layout in layouts):
        write_models(folder / family, family)
        batches[family] = batch(folder / family)
    found: dict[str, Outcome] = {}
    for world_size in sorted({layout.world_size for layout in layouts}):
        mine = [layout for layout in layouts if layout.world_size == world_size]
        work = folder, batches
        ranks = run_gloo(update, world_size, work, mine) if world_size > 1 else [update(0, 1, "", work, mine)]
        for layout, parts in zip(mine, zip(*map(pickle.loads, ranks), strict=True), strict=True):
            found[layout.name] = _outcome(batches[layout.family], parts)
    return found


def _outcome(work: TokenBatch, parts: Sequence[Any]) -> Outcome:
    """Puts the ranks' parts together as the learner does."""
    reported = {place.dp_rank: result for place, result, *_ in parts if place.reports}
    results = [reported[rank] for rank in range(parts[0][0].dp_size)]
    planned = _planned(work, len(results))
    return Outcome(
        loss=sum(result.loss for result in results),
        log_probs=merge(planned, [result.log_probs for result in results]),
        entropy=merge(planned, [result.entropy for result in results]),
        teacher=merge(planned, [result.teacher for result in results]),
        grad_norm=results[0].grad_norm,
        flop=sum(result.flop for result in results),
        weights=parts[0][2],
        gradient=parts[0][3],
    )


def difference(ours: Outcome, theirs: Outcome) -> Difference:
    """How far two outcomes are apart."""

    def apart(a: Tensor, b: Tensor) -> float:
        assert torch.equal(a.isnan(), b.isnan())
        return float((a - b).nan_to_num(0.0).abs().max())

    assert ours.gradient.keys() == theirs.gradient.keys()
    largest = max(float(tensor.abs().max()) for tensor in ours.gradient.values())
    return Difference(
        loss=abs(ours.loss - theirs.loss),
        log_probs=apart(ours.log_probs, theirs.log_probs),
        entropy=apart(ours.entropy, theirs.entropy),
        teacher=apart(ours.teacher, theirs.teacher),
        gradient=max(apart(tensor, theirs.gradient[name]) for name, tensor in ours.gradient.items()) / largest,
    )
