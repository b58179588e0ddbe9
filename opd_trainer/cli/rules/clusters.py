"""What runs the workers, and how many."""

import math
from collections.abc import Iterator

from opd_trainer.cli.named import Named
from opd_trainer.cli.rules.common import Rule
from opd_trainer.cluster.config import Layout, RayCluster, SlurmCluster
from opd_trainer.config import Config
from opd_trainer.errors import Problem
from opd_trainer.rollout.config import EmbeddedRollout, SglangRollout
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.teacher.config import SglangManagedTeacher


def cluster_ranges(config: Config, named: Named) -> Iterator[Problem]:
    """Numbers that have a smallest sensible value."""
    cluster = config.cluster
    at_least: list[tuple[str, float | None, float]] = []
    if isinstance(cluster, RayCluster):
        at_least += [
            ("num_workers", cluster.num_workers, 1),
            ("num_rollout_workers", cluster.num_rollout_workers, 1),
            ("cpus_per_worker", cluster.cpus_per_worker, 0),
            ("gpus_per_worker", cluster.gpus_per_worker, 0),
            ("num_cpus", cluster.num_cpus, 1),
            ("max_restarts", cluster.max_restarts, 0),
        ]
    if isinstance(cluster, SlurmCluster):
        at_least += [
            ("nodes", cluster.nodes, 1),
            ("gpus_per_node", cluster.gpus_per_node, 0),
            ("cpus_per_node", cluster.cpus_per_node, 1),
        ]
    for name, value, smallest in at_least:
        if value is not None and value < smallest:
            fix = f"Set cluster.{name}={smallest} or more"
            yield Problem(f"cluster.{name}", f"{value}", f"the smallest value that makes sense is {smallest}", fix)


def gpus_are_parts_or_whole(config: Config, named: Named) -> Iterator[Problem]:
    """Ray gives a worker a part of one GPU, or whole ones."""
    asked = config.cluster.gpus_per_worker if isinstance(config.cluster, RayCluster) else None
    if asked is not None and asked > 1 and not asked.is_integer():
        why = "a worker gets a part of one GPU, or whole ones"
        whole = int(asked) if math.isfinite(asked) else 1
        yield Problem("cluster.gpus_per_worker", str(asked), why, f"Set cluster.gpus_per_worker={whole}")


def a_slurm_job_forms_its_own_ray(config: Config, named: Named) -> Iterator[Problem]:
    """The nodes of a job and their CPUs are what SLURM gives."""
    if not isinstance(config.cluster, SlurmCluster):
        return
    if config.cluster.address is not None:
        why = "a SLURM job forms a Ray of its own over its nodes"
        fix = "Set cluster=ray to join the one at that address, or drop cluster.address"
        yield Problem("cluster.address", f"{config.cluster.address!r} with cluster=slurm", why, fix)
    if config.cluster.num_cpus is not None:
        why = "SLURM says how many CPUs a node has for the job"
        yield Problem("cluster.num_cpus", "set with cluster=slurm", why, "Set cluster.cpus_per_node instead")


def servers_have_gpus_of_their_own(config: Config, named: Named) -> Iterator[Problem]:
    """Servers are started beside Ray, which would give the same GPUs to workers."""
    cluster = config.cluster
    if not isinstance(cluster, SlurmCluster) or not cluster.gpus_per_node:
        return
    launched: list[tuple[str, LaunchConfig]] = []
    if isinstance(config.rollout, SglangRollout) and not config.rollout.urls:
        launched.append(("rollout.launch", config.rollout.launch))
    teachers = {"teacher": config.teacher, **{f"teachers.{name}": one for name, one in config.teachers.items()}}
    if config.opd.on:
        launched += [(f"{k}.launch", t.launch) for k, t in teachers.items() if isinstance(t, SglangManagedTeacher)]
    for key, launch in launched:
        if not launch.devices:
            count = launch.servers * launch.tensor_parallel
            fix = f"Set {key}.devices to {count} GPUs of the first node: the workers get the others"
            yield Problem(f"{key}.devices", "empty", "workers on the same node would take the same GPUs", fix)


def layout_has_two_sides(config: Config, named: Named) -> Iterator[Problem]:
    """Keeping training and rollout apart wants embedded engines: servers have devices of their own anyway."""
    cluster = config.cluster
    if not isinstance(cluster, RayCluster) or "cluster.layout" not in named:
        return
    if cluster.layout is Layout.disaggregated and not isinstance(config.rollout, EmbeddedRollout):
        why = "SGLang servers never share GPUs with workers"
        yield Problem("cluster.layout", "disaggregated with rollout=sglang", why, "Drop cluster.layout")


ALWAYS: tuple[Rule, ...] = (
    cluster_ranges,
    gpus_are_parts_or_whole,
    a_slurm_job_forms_its_own_ray,
    servers_have_gpus_of_their_own,
    layout_has_two_sides,
)
