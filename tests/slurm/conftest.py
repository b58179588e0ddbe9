"""The cluster that these tests share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.runs import world
from tests.slurm.cluster import PROGRAMS, SlurmTestCluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmTestCluster]:
    """Two nodes of SLURM on this machine."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    # Paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        cluster = SlurmTestCluster(Path(folder) / "cluster")
        cluster.write()
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a student and a teacher."""
    return world(tmp_path_factory.mktemp("world"))
