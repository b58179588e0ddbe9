"""What a configuration wants places for."""

from pathlib import Path

import pytest

from opd_trainer.build.placement import demands_of, nodes_of, planned, server_devices
from opd_trainer.cli.check import check
from opd_trainer.cli.composition import Composer
from opd_trainer.cluster.config import RayCluster
from opd_trainer.config import Config
from opd_trainer.errors import PreflightError

CONF = Path(__file__).parents[2] / "conf"


def config(compose: Composer, *overrides: str) -> Config:
    found = check(compose, overrides)
    assert found.config is not None, found.problems
    return found.config


def test_one_process_needs_no_places(compose: Composer) -> None:
    assert planned(config(compose)) is None


def test_a_ray_that_is_there_is_known_when_it_is_joined(compose: Composer) -> None:
    assert planned(config(compose, "cluster=ray", "cluster.address=head:6379")) is None


def test_every_model_is_named(compose: Composer) -> None:
    built = config(
        compose,
        *("cluster=ray", "estimator=ppo", "reference.kl_coef=0.1", "megatron.tensor_parallel=2"),
        *("+teacher@teachers.math=dedicated", "teachers.math.num_workers=3", "teachers.math.load=x"),
    )
    assert isinstance(built.cluster, RayCluster)
    training, rollout, math = demands_of(built, built.cluster)
    assert training.models == "student, critic, reference (resident), teacher (resident)"
    assert (training.size, training.block) == (2, 2)
    assert (rollout.name, rollout.size) == ("rollout", 1)
    assert (math.name, math.size) == ("teacher math", 3)


def test_servers_keep_their_gpus_from_workers(compose: Composer) -> None:
    asked = (
        *("cluster=slurm", "cluster.gpus_per_node=4", "cluster.num_workers=2", "rollout=sglang"),
        "rollout.launch.devices=[2,3]",
    )
    built = config(compose, *asked)
    assert server_devices(built) == {"rollout": [2, 3]}
    placement = planned(built)
    assert placement is not None
    assert placement.nodes[0].gpus == 2
    with pytest.raises(PreflightError, match="3 training workers of 1 GPU need 3 GPUs"):
        planned(config(compose, *asked, "cluster.num_workers=3"))


def test_workers_reserve_what_is_asked_for(compose: Composer) -> None:
    one_gpu = ("cluster=slurm", "cluster.gpus_per_node=1", "cluster.cpus_per_node=8", "cluster.cpus_per_worker=2")
    built = config(compose, *one_gpu, "cluster.gpus_per_worker=0.5")
    assert isinstance(built.cluster, RayCluster)
    assert {(demand.cpus, demand.gpus) for demand in demands_of(built, built.cluster)} == {(2.0, 0.5)}
    # Two training workers share the GPU's half that is not the rollout worker's.
    placement = planned(built)
    assert placement is not None
    assert [seat.share for seat in placement.seats] == [0.25, 0.25, 0.25]


def test_the_nodes_of_a_job(compose: Composer) -> None:
    built = config(compose, "cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.cpus_per_node=96")
    assert isinstance(built.cluster, RayCluster)
    assert [(node.cpus, node.gpus) for node in nodes_of(built.cluster)] == [(96.0, 8), (96.0, 8)]
