"""A run on a Ray that somebody else started: by its address, and as a job of it."""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_trainer.cluster.rendezvous import free_port
from tests.runs.runs import ROOT, arguments, column, distil, world

pytestmark = pytest.mark.ray

RAY = (sys.executable, "-m", "ray.scripts.scripts")
LEFT = """
import ray, time
ray.init(log_to_driver=False)
deadline = time.monotonic() + 300
while (cpus := ray.available_resources().get("CPU", 0.0)) < 2 and time.monotonic() < deadline: time.sleep(0.2)
print(cpus)
"""
"""CPUs that nobody uses, once what has just ended has given back its own."""
SIZES = ("steps=1", "cluster=ray", "cluster.num_workers=1", "cluster.threads=1", "tracking.console=true")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def somebody_elses() -> Iterator[dict[str, str]]:
    """Environment variables for a Ray; OPD_HEAD says where."""
    port = free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OPD_HEAD": f"127.0.0.1:{port}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        options = [
            *("start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=0"),
            *(
                "--include-dashboard=false",
                f"--temp-dir={folder}",
                "--object-store-memory=100000000",
                "--disable-usage-stats",
                "--block",
            ),
        ]
        log = Path(folder) / "head.log"
        with log.open("wb") as output:
            head = subprocess.Popen([*RAY, *options], env=environment, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 600
            while b"Ray runtime started" not in log.read_bytes():
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield environment
        finally:
            head.terminate()
            head.wait(300)


def test_a_run_joins_the_ray_at_an_address(small: Path, somebody_elses: dict[str, str]) -> None:
    output = small / "joined"
    command = [*arguments(small, output, *distil(small), *SIZES), f"cluster.address={somebody_elses['OPD_HEAD']}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *command],
        cwd=small,
        env=somebody_elses,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "placement: 1 node, colocate" in done.stdout
    assert len(list(column(output, "train/loss"))) == 1


def test_a_ray_job_runs_on_the_ray_that_it_was_submitted_to(small: Path, somebody_elses: dict[str, str]) -> None:
    # This is all that `ray job submit` tells a job; submitting itself wants the packages of ray[default].
    environment = somebody_elses | {"RAY_ADDRESS": somebody_elses["OPD_HEAD"]}
    output = small / "job"
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *arguments(small, output, *distil(small), *SIZES)],
        cwd=small,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "placement: 1 node, colocate" in done.stdout
    assert list(column(output, "train/loss")) == list(column(small / "joined", "train/loss"))
    # Nothing of the run stays on it, and it goes on.
    left = subprocess.run(
        [sys.executable, "-c", LEFT], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert left.stdout.strip() == "2.0", left.stderr
