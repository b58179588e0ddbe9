"""Every estimator and policy loss that there is, every setting around them, and batches to try them on.

All of it is found by itself: options of `estimator=` in conf/, classes in the packages, members of enumerations.
"""

import dataclasses
import importlib
import math
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from opd_trainer import loss
from opd_trainer.cli.schema import SCHEMAS
from opd_trainer.divergence.config import DivergenceConfig, DivergenceKind
from opd_trainer.estimator.base import Estimator
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.loss.clip import ClipLoss
from opd_trainer.loss.config import Correction, KlApply, KlEstimator, LossConfig, ReferenceConfig
from opd_trainer.loss.policy import PolicyLoss
from opd_trainer.loss.problems import reference_problems
from opd_trainer.objective import Objective
from opd_trainer.opd.config import OpdApply, OpdConfig, OpdType, StudentLogProb, TokenWeights, WeightsConfig
from opd_trainer.types import Scores, TokenBatch
from opd_trainer.updates import Live

NAN = math.nan
CONF = Path(__file__).parents[2] / "conf"


def _option(file: Path) -> Estimator:
    """What `estimator=NAME` gives."""
    written = yaml.safe_load(file.read_text())
    name = written.pop("defaults")[0].removesuffix("@_here_").rpartition("/")[2]
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SCHEMAS["estimator"][name]), written))
    assert isinstance(found, Estimator)
    return found


def _subclasses(package: ModuleType, base: type) -> list[type]:
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found, waiting = [], [base]
    while waiting:
        for child in waiting.pop().__subclasses__():
            waiting.append(child)
            # dataclass(slots=True) makes a new class; the old one is still known as a subclass.
            if getattr(importlib.import_module(child.__module__), child.__name__) is child:
                found.append(child)
    return sorted(found, key=lambda child: child.__name__)


POLICY_LOSSES: dict[str, PolicyLoss] = {child.__name__: child() for child in _subclasses(loss, PolicyLoss)}
POLICY_LOSSES["ClipLoss(dual_clip=3)"] = ClipLoss(dual_clip=3.0)
ESTIMATORS: dict[str, Estimator] = {file.stem: _option(file) for file in sorted(CONF.glob("estimator/*.yaml"))}
_USED = [estimator.loss for estimator in ESTIMATORS.values()]
# A loss that is no estimator's own obeys the laws too.
ESTIMATORS |= {f"none, {name}": NoEstimator(loss=one) for name, one in POLICY_LOSSES.items() if one not in _USED}


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What is switched on around an estimator."""

    opd: OpdConfig = dataclasses.field(default_factory=lambda: OpdConfig(type=OpdType.megatron))
    reference: ReferenceConfig = dataclasses.field(default_factory=lambda: ReferenceConfig(kl_coef=0.1))
    options: LossConfig = dataclasses.field(
        default_factory=lambda: LossConfig(entropy_coef=0.01, correction=Correction.tis)
    )

    def replace(self, **changes: Any) -> dict[str, Any]:
        """As arguments of `objective`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changes


OPD_CHANGES: dict[str, dict[str, Any]] = {
    **{f"apply={value}": {"apply": value} for value in OpdApply},
    **{f"student_log_prob={value}": {"student_log_prob": value} for value in StudentLogProb},
    **{f"weights.kind={value}": {"weights": WeightsConfig(kind=value)} for value in TokenWeights},
    # One stands for all: `loss_and_gradient` plays the worker, and the objective does not look at which it is.
    "divergence.kind=reverse_kl": {"divergence": DivergenceConfig(kind=DivergenceKind.reverse_kl)},
    "only_reward=true": {"only_reward": True},
    "in_returns=true": {"in_returns": True},
    "clip=1": {"clip": 1.0},
    "trust_alpha=0.5": {"trust_alpha": 0.5},
}
"""Every way of shaping the OPD term, one at a time."""
REFERENCES = [
    reference
    for apply in KlApply
    for kind in KlEstimator
    if not reference_problems(reference := ReferenceConfig(kl_coef=0.1, apply=apply, estimator=kind))
]
SURROUNDINGS: dict[str, Surroundings] = {
    "opd": Surroundings(),
    **{
        name: Surroundings(opd=OpdConfig(type=OpdType.megatron, **changes))
        for name, changes in OPD_CHANGES.items()
        if OpdConfig(**changes) != OpdConfig()
    },
    **{
        f"correction={value}": Surroundings(options=LossConfig(entropy_coef=0.01, correction=value))
        for value in Correction
    },
    **{f"reference={one.estimator} as {one.apply}": Surroundings(reference=one) for one in REFERENCES},
}
estimators = pytest.mark.parametrize("name", ESTIMATORS)
surroundings = pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)


def objective(estimator: Estimator, **changes: Any) -> Objective:
    """An objective with OPD on unless `changes` say otherwise."""
    pieces: dict[str, Any] = {
        "estimator": estimator,
        "opd": OpdConfig(type=OpdType.megatron),
        "reference": ReferenceConfig(),
        "options": LossConfig(),
        "temperature": 1.0,
        "max_response_tokens": 16,
        "total_steps": 10,
        "seed": 0,
    }
    return Objective(**(pieces | changes))


def scores(log_probs: Tensor, model: str = "model", temperature: float = 1.0) -> Scores:
    return Scores(log_probs=log_probs, temperature=temperature, model=model)


def batch_of(responses: list[list[int]], seed: int = 0, prompt_tokens: int = 2, **changes: Any) -> TokenBatch:
    """A batch with every field scored and random, NaN where masked. `responses` holds a mask (0 and 1) per sequence."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([bit for response in responses for bit in [0] * prompt_tokens + response], dtype=torch.bool)
    lengths = torch.tensor([prompt_tokens + len(response) for response in responses])
    seq = torch.repeat_interleave(torch.arange(len(responses)), lengths)

    def log_probs(model: str) -> Scores:
        drawn = -2 * torch.rand(len(mask), generator=generator) - 0.05
        return scores(torch.where(mask, drawn, NAN), model)

    fields: dict[str, Any] = {
        "tokens": torch.randint(0, 9, (len(mask),), generator=generator),
        "seq": seq,
        "mask": mask,
        "group": torch.arange(len(responses)) // 2,
        "reward": torch.rand(len(responses), generator=generator),
        "truncated": torch.zeros(len(responses), dtype=torch.bool),
        "teacher_name": ("default",) * len(responses),
        "rollout": log_probs("rollout"),
        "version": torch.zeros(len(responses), dtype=torch.int64),
        "old": log_probs("old"),
        "reference": log_probs("reference"),
        "teacher": log_probs("teacher"),
        "values": torch.where(mask, torch.randn(len(mask), generator=generator), NAN),
    }
    return TokenBatch(**(fields | changes))


def live_log_probs(batch: TokenBatch, seed: int = 1) -> Tensor:
    """Student log-probs near the old ones, NaN where masked."""
    assert batch.old is not None
    noise = 0.1 * torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(seed))
    return batch.old.log_probs + noise


def loss_and_gradient(chosen: Objective, batch: TokenBatch, log_probs: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
    """sum_t weight[t] * loss[t], and its gradient with respect to log-probs and entropies."""
    leaves = [log_probs.clone().requires_grad_(), entropy.clone().requires_grad_()]
    assert batch.weight is not None
    loss = chosen.loss()
    # What a worker would compute from whole distributions; here something that depends on the student as they do.
    dense = torch.where(batch.mask, torch.where(batch.mask, leaves[0], 0.0).square(), NAN)
    divergence = None if loss.wants.divergence is None else dense
    total = (loss(Live(log_probs=leaves[0], entropy=leaves[1], divergence=divergence), batch) * batch.weight).sum()
    total.backward()
    return total.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells 0.0 from -0.0."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
