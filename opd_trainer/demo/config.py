"""The embedded demo: a synthetic task and two tiny models trained on it."""

from dataclasses import dataclass


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
    """Operands of a problem, each 1 to 99."""
    num_train: int = 20000
    """Training problems."""
    num_heldout: int = 256
    """Held-out problems, disjoint from the training problems."""
    teacher_accuracy: float = 0.95
    """Held-out accuracy at which the teacher is done."""
    student_accuracy: float = 0.45
    """Held-out accuracy at which the student's snapshot is taken (first evaluation at or above it)."""
    max_steps: int = 3000
    """Optimizer steps after which building the teacher is given up."""
