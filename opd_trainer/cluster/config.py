"""What runs the workers."""

from dataclasses import dataclass


@dataclass(slots=True)
class ClusterConfig:
    """What every kind of cluster knows; a kind's own settings are fields of its subclass."""

    threads: int | None = None
    """CPU threads of torch in the controller's process; null leaves torch's choice, one per core. Tiny models are
    fastest with 1. (Ray gives its workers as many as they reserve CPUs, at least 1.)"""


@dataclass(slots=True)
class InProcessCluster(ClusterConfig):
    """Everything in one process: one device or the CPU; debuggable with pdb."""


@dataclass(slots=True)
class RayCluster(ClusterConfig):
    """Workers are Ray actors."""

    num_workers: int = 2
    """Megatron workers; tensor x pipeline x context parallel sizes must divide it."""
    num_rollout_workers: int = 1
    """Embedded engines that share the prompts."""
    cpus_per_worker: float = 0.5
    """Logical CPUs that a worker reserves; training and rollout take turns, so that they can share cores."""
    gpus_per_worker: float | None = None
    """GPUs of a Megatron worker; null means 1 where the machine has GPUs, otherwise 0."""
    address: str | None = None
    """A Ray cluster that is already there; null starts one."""
    num_cpus: int | None = None
    """Logical CPUs of the Ray that we start; null means those of the machine."""
