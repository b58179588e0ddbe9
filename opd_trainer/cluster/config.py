"""What runs the workers."""

from dataclasses import dataclass, field
from enum import StrEnum, auto


class Layout(StrEnum):
    """Who shares GPUs."""

    colocate = auto()
    """Training and rollout take turns on the same GPUs."""
    disaggregated = auto()
    """Training and rollout have GPUs of their own."""


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
    layout: Layout = Layout.colocate
    """colocate or disaggregated. Dedicated teachers and SGLang servers have GPUs of their own in both."""
    cpus_per_worker: float = 0.5
    """Logical CPUs that a worker reserves; training and rollout take turns, so that they can share cores."""
    gpus_per_worker: float | None = None
    """Whole GPUs of a worker, or a part of one; null means 1 where there are GPUs, otherwise 0. Where training and
    rollout share a GPU, each gets half of this."""
    address: str | None = None
    """A Ray cluster that is already there; null takes that of RAY_ADDRESS (set by `ray job submit`), or starts one."""
    num_cpus: int | None = None
    """Logical CPUs of the Ray that we start; null means those of the machine."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the workers."""
    max_restarts: int = 0
    """How often in a run workers that died are replaced: rollout workers alone, training from the newest checkpoint.
    The controller then keeps a copy of the student's weights in host memory."""


@dataclass(slots=True)
class SlurmCluster(RayCluster):
    """A SLURM job, or an array of them for a sweep, in which Ray runs over the nodes. What the site decides (partition,
    account, time) is in `hydra.launcher.*`."""

    nodes: int = 1
    """Nodes of a job."""
    gpus_per_node: int | None = None
    """GPUs to ask for on each node; null asks for none."""
    cpus_per_node: int | None = None
    """CPUs to ask for on each node; null leaves it to SLURM, which often gives one."""
    wait: bool = True
    """Wait for the jobs and show what becomes of them; false submits and returns."""
    grace_s: float = 100.0
    """How long after SLURM's signal to wait for the end of a step, seconds; then the job goes back into the queue
    without saving. Shorter than `hydra.launcher.signal_delay_s`."""
    start_timeout_s: float = 300.0
    """How long the nodes of a job may take to find each other, seconds."""
