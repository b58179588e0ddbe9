"""The embedded demo: a synthetic task and two tiny models trained on it."""

from dataclasses import dataclass, field

from opd_trainer.megatron.config import MegatronConfig, OptimizerConfig, Schedule
from opd_trainer.model.config import ArchitectureConfig


@dataclass(slots=True)
class DemoConfig:
    """Recipe of the arithmetic demo.

    Paths that start with `demo:` (demo:teacher, demo:student, demo:train, demo:heldout) name what it builds; it
    is built once per recipe, under `cache`.
    """

    cache: str = "checkpoints"
    """Folder of the hash-keyed cache."""
    seed: int = 0
    """Seed of data, initial weights and batches."""
    num_operands: int = 3
    """Operands of a problem, each 10 to 99."""
    num_train: int = 20000
    """Training problems."""
    num_heldout: int = 256
    """Held-out problems, disjoint from the training problems."""
    teacher_accuracy: float = 0.99
    """Held-out accuracy at which the teacher is done."""
    student_accuracy: float = 0.4
    """Held-out accuracy at which the student's snapshot is taken (first evaluation at or above it)."""
    max_steps: int = 900
    """Optimizer steps after which building the teacher is given up."""
    batch_size: int = 32
    """Problems per optimizer step of the supervised training."""
    eval_every: int = 25
    """Optimizer steps between held-out evaluations."""
    architecture: ArchitectureConfig = field(
        default_factory=lambda: ArchitectureConfig(
            hidden_size=64, num_layers=2, head_dim=16, intermediate_size=192, rope_theta=100.0
        )
    )
    """Shape of both models."""
    megatron: MegatronConfig = field(
        default_factory=lambda: MegatronConfig(
            optimizer=OptimizerConfig(lr=5e-3, schedule=Schedule.linear, warmup_steps=40, weight_decay=0.01)
        )
    )
    """Optimizer of the supervised training."""
