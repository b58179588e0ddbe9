"""What a configuration wants places for, and where it would get them."""

import dataclasses
import os

import torch

from opd_trainer.build.roster import dedicated_layout, teachers_of, title_of
from opd_trainer.cluster.config import RayCluster, SlurmCluster
from opd_trainer.cluster.placement import ROLLOUT, TRAINING, Demand, Node, Placement, place
from opd_trainer.config import Config
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.layout import model_parallel_size
from opd_trainer.opd.config import OpdType
from opd_trainer.rollout.config import EmbeddedRollout, SglangRollout
from opd_trainer.task.config import TrainTask
from opd_trainer.teacher.config import DedicatedTeacher, SglangManagedTeacher
from opd_trainer.teacher.inline import placement_of


def training_demand(config: Config, cluster: RayCluster) -> Demand:
    """Of the Megatron workers."""
    models = ["student"]
    if isinstance(config.task, TrainTask):
        if config.estimator.critic_loss is not None:
            models.append("critic")
        if config.reference.used:
            models.append(f"reference ({config.reference.placement})")
        models += [
            f"{title_of(name)} ({placement_of(teacher)})"
            for name, teacher in teachers_of(config).items()
            if config.opd.type is OpdType.megatron and not isinstance(teacher, DedicatedTeacher)
        ]
    phases = "score, update, sync"
    return _demand(TRAINING, cluster.num_workers, cluster, config.megatron, ", ".join(models), phases)


def rollout_demand(config: Config, cluster: RayCluster) -> Demand:
    """Of the embedded engines."""
    phases = "rollout, evaluate, sync"
    return _demand(ROLLOUT, cluster.num_rollout_workers, cluster, None, "the student's engine", phases)


def dedicated_demand(name: str, teacher: DedicatedTeacher, config: Config, cluster: RayCluster) -> Demand:
    """Of a teacher's own workers."""
    label = f"teacher {name}"
    return _demand(label, teacher.num_workers, cluster, dedicated_layout(teacher, config), label, "rollout")


def _demand(
    name: str, size: int, cluster: RayCluster, layout: MegatronConfig | None, models: str, phases: str
) -> Demand:
    # Ranks that share each layer are neighbours; a whole replica is together where it can be.
    block = 1 if layout is None else min(model_parallel_size(layout), size)
    return Demand(name, size, cluster.cpus_per_worker, cluster.gpus_per_worker, block, models, phases)


def demands_of(config: Config, cluster: RayCluster) -> list[Demand]:
    """Everything that task=train wants a place for, in the order in which places are given away."""
    dedicated = [
        dedicated_demand(name, teacher, config, cluster)
        for name, teacher in teachers_of(config).items()
        if isinstance(teacher, DedicatedTeacher)
    ]
    engines = [rollout_demand(config, cluster)] if isinstance(config.rollout, EmbeddedRollout) else []
    return [training_demand(config, cluster), *engines, *dedicated]


def server_devices(config: Config) -> dict[str, list[int]]:
    """GPUs of the controller's node that SGLang servers of ours have, by what they serve; workers get the others."""
    found: dict[str, list[int]] = {}
    if isinstance(config.rollout, SglangRollout) and not config.rollout.urls:
        found["rollout"] = config.rollout.launch.devices
    for name, teacher in teachers_of(config).items():
        if isinstance(teacher, SglangManagedTeacher):
            found[title_of(name)] = teacher.launch.devices
    return {name: devices for name, devices in found.items() if devices}


def planned(config: Config) -> Placement | None:
    """Where everything would sit on the nodes that the configuration asks for; None in one process, and on a Ray that
    is there already, which is known only when it is joined.

    Raises:
        PreflightError: there is too little of something.
    """
    cluster = config.cluster
    if not isinstance(cluster, RayCluster) or cluster.address is not None:
        return None
    first, *others = nodes_of(cluster)
    if isinstance(cluster, SlurmCluster):
        served = {device for devices in server_devices(config).values() for device in devices}
        first = dataclasses.replace(first, gpus=max(0, first.gpus - len(served)))
    return place(demands_of(config, cluster), [first, *others], cluster.layout)


def nodes_of(cluster: RayCluster) -> list[Node]:
    """The nodes of a job that is still to be submitted, or this machine."""
    if isinstance(cluster, SlurmCluster):
        # Where the number is left to SLURM, it is found out in the job.
        cpus = float("inf") if cluster.cpus_per_node is None else float(cluster.cpus_per_node)
        return [Node(f"node {number}", cpus, cluster.gpus_per_node or 0) for number in range(cluster.nodes)]
    return [Node("this machine", float(cluster.num_cpus or os.cpu_count() or 1), torch.cuda.device_count())]
