"""The root of the configuration: the only place, with the dataclasses that it names, where a default is written.

Options under conf/ choose a subclass (a *schema*) for each group and state only what makes them that option.
"""

from dataclasses import dataclass, field
from enum import StrEnum, auto

from omegaconf import MISSING

from opd_trainer.cluster.config import ClusterConfig
from opd_trainer.data.config import DataConfig
from opd_trainer.demo.config import DemoConfig
from opd_trainer.estimator.base import Estimator
from opd_trainer.eval.config import EvalConfig
from opd_trainer.loss.config import LossConfig, ReferenceConfig
from opd_trainer.megatron.config import CriticConfig, MegatronConfig
from opd_trainer.model.config import ModelConfig
from opd_trainer.opd.config import OpdConfig
from opd_trainer.reward.config import RewardConfig
from opd_trainer.rollout.config import RolloutConfig
from opd_trainer.task.config import TaskConfig
from opd_trainer.teacher.config import TeacherConfig
from opd_trainer.tracking.config import TrackingConfig


class Resume(StrEnum):
    """What to do with an earlier run of the same configuration."""

    never = auto()
    """Start a new run directory."""
    auto = auto()
    """Continue the latest unfinished run of this configuration if there is one, otherwise start anew."""


@dataclass(slots=True)
class CheckpointConfig:
    """When the state of a run is saved, inside its run directory."""

    every: int = 50
    """Steps between checkpoints; one is always written after the last step. 0 writes only that one."""
    keep: int = 2
    """Checkpoints kept, newest first, at least 1; older ones are deleted."""
    async_save: bool = False
    """Write while training goes on; takes host memory for a second copy of weights and optimizer. A crash meanwhile
    falls back to the checkpoint before."""


@dataclass(slots=True)
class Config:
    """A whole run. Groups are chosen as `group=option`; every key below can be set as `key=value`."""

    name: str = "run"
    """Name of the run, for its directory and its trackers."""
    seed: int = 0
    """Seed of prompts, sampling and initial weights."""
    steps: int = 100
    """Training steps: one batch of rollouts each."""
    output_dir: str | None = None
    """Run directory; null makes outputs/<name>/<date-time>. In a sweep, the parent of the jobs' directories."""
    resume: Resume = Resume.never
    """never or auto: continue the latest unfinished run with the same settings. A sweep is always continued."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the state of a run is saved."""
    task: TaskConfig = MISSING
    """What the launcher does."""
    estimator: Estimator = MISSING
    """Advantage estimator with its policy loss."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What of the loss does not depend on the estimator."""
    opd: OpdConfig = field(default_factory=OpdConfig)
    """On-policy distillation."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """Frozen reference model of a KL penalty."""
    teacher: TeacherConfig = MISSING
    """The teacher of samples that name no other."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """More teachers by name, each chosen with `+teacher@teachers.<name>=<option>`."""
    model: ModelConfig = MISSING
    """The student."""
    megatron: MegatronConfig = MISSING
    """Parallel layout, micro-batches and optimizer."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Value model of `estimator=ppo`."""
    data: DataConfig = MISSING
    """Training prompts."""
    reward: RewardConfig = MISSING
    """Task reward."""
    rollout: RolloutConfig = MISSING
    """How responses are generated."""
    cluster: ClusterConfig = MISSING
    """What runs the workers."""
    eval: EvalConfig = MISSING
    """Evaluation on held-out prompts."""
    tracking: TrackingConfig = MISSING
    """Where metrics go."""
    demo: DemoConfig | None = None
    """Recipe behind paths that start with `demo:`; null outside the demo."""
