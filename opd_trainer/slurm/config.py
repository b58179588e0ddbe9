"""What a site decides about its SLURM jobs."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class SlurmQueue:
    """Settings of a site, `hydra.launcher.*`; profiles are files conf/hydra/launcher/<site>.yaml, chosen with
    `hydra/launcher=<site>`. How many nodes, GPUs and CPUs a job gets is in `cluster.*`."""

    _target_: str = "hydra_plugins.opd_trainer_launcher.SlurmLauncher"
    """Hydra's plugin; not to be changed."""
    partition: str | None = None
    """Partition; null takes the site's default."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    timeout_min: int = 1440
    """Time limit, minutes; two minutes before it the run saves and the job goes back into the queue."""
    mem_gb: float | None = None
    """Memory of each node, GB; 0 asks for all of it, null leaves it to SLURM."""
    constraint: str | None = None
    """Features that nodes must have."""
    nodelist: str | None = None
    """Nodes to run on."""
    exclude: str | None = None
    """Nodes to avoid."""
    exclusive: bool = False
    """Share nodes with nobody."""
    comment: str | None = None
    """Comment of the job."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run before the job: `module load ...`, `export NCCL_...`."""
    srun_args: list[str] = field(default_factory=list)
    """More arguments of `srun`, one list entry each."""
    additional_parameters: dict[str, str] = field(default_factory=dict)
    """More options of `sbatch`: name without dashes -> value."""
    array_parallelism: int = 256
    """Trials of a sweep that run at once, >= 1."""
    signal_delay_s: int = 120
    """How long before the time limit the job is told to save, seconds; longer than a training step and a save take."""
    max_num_timeout: int = 100
    """How often a job that ran into its time limit goes back into the queue."""
