"""Ray over two nodes of a job, without SLURM: both are this machine, at two addresses."""

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opd_trainer.cluster import nodes
from opd_trainer.cluster.nodes import JobTask, head, member, this_task
from opd_trainer.errors import WorkerError

LOOK = """
import ray
ray.init(_node_ip_address="127.0.1.1", log_to_driver=False)
import time
while sum(node["Alive"] for node in ray.nodes()) < 2: time.sleep(0.1)
print(sorted((node["NodeManagerAddress"], node["Resources"]["CPU"]) for node in ray.nodes()))
"""


def task(rank: int, attempt: str = "7.0") -> JobTask:
    return JobTask(rank, 2, attempt, f"127.0.1.{rank + 1}", cpus=rank + 1, gpus=())


@pytest.mark.ray
def test_two_tasks_form_one_ray_and_end_it(tmp_path: Path) -> None:
    before = dict(os.environ)
    joined = threading.Thread(target=member, args=(task(1), tmp_path, 300.0))
    joined.start()
    with head(task(0), tmp_path, 300.0) as address:
        assert os.environ["RAY_ADDRESS"] == address
        assert address.startswith("127.0.1.1:")
        told = tmp_path / "ray-7.0" / "head.json"
        assert stat.S_IMODE(told.stat().st_mode) == 0o600
        seen = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=False, timeout=400)
        assert seen.stdout.strip() == "[('127.0.1.1', 1.0), ('127.0.1.2', 2.0)]", seen.stderr
    joined.join(300)
    assert not joined.is_alive()
    assert dict(os.environ) == before
    assert not told.exists()


def test_a_member_without_a_head_gives_up(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"rank 0 did not start Ray within 0.3 s"):
        member(task(1), tmp_path, 0.3)


def test_a_member_ends_with_a_head_that_never_came(tmp_path: Path) -> None:
    place = tmp_path / "ray-7.0"
    place.mkdir()
    (place / "done").touch()
    member(task(1), tmp_path, 60.0)


def test_an_earlier_attempt_is_not_mistaken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "ray-7.0").mkdir()
    (tmp_path / "ray-7.0" / "done").touch()
    with pytest.raises(WorkerError, match="did not start Ray"):
        member(task(1, "7.1"), tmp_path, 0.3)


def test_a_head_that_dies_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "RAY", (sys.executable, "-c", "import sys; sys.exit('no licence')"))
    began = time.monotonic()
    with (
        pytest.raises(WorkerError, match=r"Ray did not start on 127.0.1.1(?s:.*)no licence"),
        head(task(0), tmp_path, 600),
    ):
        pass
    assert time.monotonic() - began < 300
    assert (tmp_path / "ray-7.0" / "done").exists()


def test_what_slurm_says_of_a_task() -> None:
    environment = {
        "SLURM_JOB_ID": "12",
        "SLURM_PROCID": "3",
        "SLURM_NNODES": "4",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    found = this_task(environment)
    assert (found.rank, found.nodes, found.attempt, found.cpus, found.gpus) == (3, 4, "12.2", 8, ("0", "1"))
    with pytest.raises(WorkerError, match="not started by SLURM"):
        this_task({})
