"""The root of the configuration: the only place, with the dataclasses that it names, where a default is written.

Options under conf/ choose a subclass (a *schema*) for each group and state only what makes them that option.
"""

from dataclasses import dataclass, field
from enum import StrEnum, auto

from opd_trainer.cluster.config import ClusterConfig, InProcessCluster, RayCluster
from opd_trainer.data.config import DataConfig
from opd_trainer.demo.config import DemoConfig
from opd_trainer.estimator.base import Estimator
from opd_trainer.eval.config import EvalConfig
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.model.config import ModelConfig
from opd_trainer.opd.config import OpdConfig
from opd_trainer.reward.config import RewardConfig
from opd_trainer.rollout.config import EmbeddedRollout, RolloutConfig
from opd_trainer.task.config import EvaluateTask, SftTask, TaskConfig, TrainTask
from opd_trainer.teacher.config import ResidentTeacher, TeacherConfig
from opd_trainer.tracking.config import TrackingConfig


class Resume(StrEnum):
    """What to do with an earlier run of the same configuration."""

    never = auto()
    """Start a new run directory."""
    auto = auto()
    """Continue the latest unfinished run of this configuration if there is one, otherwise start anew."""
