"""The list of schemas: group -> name -> dataclass. An option conf/<group>/<option>.yaml starts from one of them.

A new option is a dataclass named here and a YAML file of a few lines; `tests/test_conf.py` compares the two.
"""

from hydra.core.config_store import ConfigStore

from opd_trainer.cluster.config import InProcessCluster, RayCluster, SlurmCluster
from opd_trainer.config import Config
from opd_trainer.data.config import DataConfig, MixtureData
from opd_trainer.demo.config import DemoConfig
from opd_trainer.estimator.cispo import Cispo
from opd_trainer.estimator.grpo import Grpo
from opd_trainer.estimator.gspo import Gspo
from opd_trainer.estimator.none import NoEstimator
from opd_trainer.estimator.ppo import Ppo
from opd_trainer.estimator.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from opd_trainer.estimator.rloo import Rloo
from opd_trainer.estimator.sapo import Sapo
from opd_trainer.eval.config import EvalConfig
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.model.config import ModelConfig
from opd_trainer.opd.config import OpdConfig
from opd_trainer.reward.config import (
    CompositeReward,
    CustomReward,
    ExactReward,
    FormatReward,
    Gsm8kReward,
    LengthReward,
    MathReward,
    NoReward,
    RemoteReward,
)
from opd_trainer.rollout.config import EmbeddedRollout, SglangRollout
from opd_trainer.slurm.config import SlurmQueue
from opd_trainer.task.config import (
    ConvertTask,
    DoctorTask,
    EvaluateTask,
    PreflightTask,
    ServeTask,
    ServeTeacherTask,
    SftTask,
    SummarizeTask,
    TrainTask,
)
from opd_trainer.teacher.config import (
    DedicatedTeacher,
    OffloadTeacher,
    ResidentTeacher,
    SglangExternalTeacher,
    SglangManagedTeacher,
    SwapTeacher,
)
from opd_trainer.tracking.config import TrackingConfig

SCHEMAS: dict[str, dict[str, type]] = {
    "task": {
        "train": TrainTask,
        "sft": SftTask,
        "evaluate": EvaluateTask,
        "convert": ConvertTask,
        "doctor": DoctorTask,
        "preflight": PreflightTask,
        "summarize": SummarizeTask,
        "serve_teacher": ServeTeacherTask,
        "serve": ServeTask,
    },
    "estimator": {
        "grpo": Grpo,
        "gspo": Gspo,
        "sapo": Sapo,
        "cispo": Cispo,
        "rloo": Rloo,
        "reinforce_plus_plus": ReinforcePlusPlus,
        "reinforce_plus_plus_baseline": ReinforcePlusPlusBaseline,
        "ppo": Ppo,
        "none": NoEstimator,
    },
    "opd": {"base": OpdConfig},
    "teacher": {
        "resident": ResidentTeacher,
        "offload": OffloadTeacher,
        "swap": SwapTeacher,
        "dedicated": DedicatedTeacher,
        "sglang_external": SglangExternalTeacher,
        "sglang_managed": SglangManagedTeacher,
    },
    "model": {"base": ModelConfig},
    "megatron": {"base": MegatronConfig},
    "data": {"file": DataConfig, "mixture": MixtureData},
    "reward": {
        "exact": ExactReward,
        "none": NoReward,
        "gsm8k": Gsm8kReward,
        "math": MathReward,
        "format": FormatReward,
        "length": LengthReward,
        "composite": CompositeReward,
        "remote": RemoteReward,
        "custom": CustomReward,
    },
    "rollout": {"embedded": EmbeddedRollout, "sglang": SglangRollout},
    "cluster": {"inprocess": InProcessCluster, "ray": RayCluster, "slurm": SlurmCluster},
    "eval": {"base": EvalConfig},
    "tracking": {"base": TrackingConfig},
    "demo": {"arithmetic": DemoConfig},
}


def register() -> None:
    """Tells Hydra about every schema. Safe to call twice."""
    store = ConfigStore.instance()
    store.store(group="schema", name="root", node=Config)
    store.store(group="hydra/launcher", name="schema_slurm", node=SlurmQueue)
    for group, schemas in SCHEMAS.items():
        for name, node in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=node)
