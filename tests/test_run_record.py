import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd_trainer.cluster.config import InProcessCluster
from opd_trainer.config import Config
from opd_trainer.errors import DataError, UserError
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.run_record import RunStatus, alone_in, read_record, write_record
from opd_trainer.teacher.config import ResidentTeacher

ROOT = Path(__file__).parents[1]
CONFIG = Config(megatron=MegatronConfig(), teacher=ResidentTeacher(), cluster=InProcessCluster())
HOLD = """
import sys, time
from pathlib import Path
from opd_trainer.run_record import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_record_is_read_back(tmp_path: Path) -> None:
    write_record(tmp_path, CONFIG, RunStatus.failed, DataError("row 7 is empty\nand more"))
    record = read_record(tmp_path)
    assert record is not None
    assert (record.status, record.error) == (RunStatus.failed, "DataError: row 7 is empty")
    write_record(tmp_path, CONFIG, RunStatus.finished)
    record = read_record(tmp_path)
    assert record is not None
    assert (record.status, record.error) == (RunStatus.finished, None)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "running"}', '{"config_hash": "x", "status": "odd"}'])
def test_what_is_no_record_is_none(tmp_path: Path, content: str) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / "run.json").write_text(content)
    assert read_record(tmp_path) is None


def test_two_processes_cannot_run_in_one_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(UserError, match="another process runs in it"), alone_in(tmp_path):
                pass
        finally:
            other.kill()
    # However the other process ended.
    with alone_in(tmp_path):
        pass
