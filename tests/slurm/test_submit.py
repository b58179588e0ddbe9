"""What is asked of SLURM, and what is made of its answers; SLURM itself is not needed."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from opd_trainer.cluster.config import SlurmCluster
from opd_trainer.config import Config
from opd_trainer.errors import JobFailed, PreflightError
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.slurm import queue as slurm_queue
from opd_trainer.slurm import submit as slurm_submit
from opd_trainer.slurm.code import code_lines, freeze_code
from opd_trainer.slurm.config import SlurmQueue
from opd_trainer.slurm.queue import GONE, UNREACHABLE, Outcome, State, Submitted, cpus_of_nodes, ended, states
from opd_trainer.slurm.submit import ToRun, failure, wait
from opd_trainer.teacher.config import ResidentTeacher


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs that are found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def answers(folder: Path, name: str, text: str, *, error: str = "") -> None:
    """Makes a program that prints `text`, or fails with `error`."""
    (folder / f"{name}.txt").write_text(text)
    program = folder / name
    ending = f"echo '{error}' >&2; exit 1" if error else "exit 0"
    program.write_text(f"#!/bin/sh\ncat '{folder}/{name}.txt'\n{ending}\n")
    program.chmod(0o755)


def submitted(folder: Path, job_id: str = "7") -> Submitted:
    return Submitted(job_id, folder, folder / "log.out", folder / "result.pkl")


def test_states_come_from_squeue_and_then_from_sacct(programs: Path) -> None:
    answers(programs, "squeue", "7_0|RUNNING|None\n7_1|PENDING|Resources\n")
    answers(programs, "sacct", "8|CANCELLED by 0\n")
    found = states(["7_0", "7_1", "8", "9"])
    assert {job: str(state) for job, state in found.items()} == {
        "7_0": "running",
        "7_1": "pending (Resources)",
        "8": "cancelled",
        "9": GONE.lower(),
    }


def test_a_controller_that_does_not_answer_has_forgotten_no_job(programs: Path) -> None:
    answers(programs, "sacct", "", error="Slurm accounting storage is disabled")
    answers(programs, "squeue", "", error="slurm_load_jobs error: Unable to contact slurm controller")
    assert states(["7"]) == {"7": State(UNREACHABLE)}
    answers(programs, "squeue", "", error="slurm_load_jobs error: Invalid job id specified")
    assert states(["7"]) == {"7": State(GONE)}


def test_a_result_is_read_and_a_traceback_too(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    job.result.write_bytes(pickle.dumps(("success", 0.5)))
    assert ended(job, "COMPLETED").value == 0.5
    job.result.write_bytes(pickle.dumps(("error", "Traceback\nZeroDivisionError: oh\n")))
    end = ended(job, "FAILED")
    assert end.outcome is Outcome.failed
    error = failure(end)
    assert isinstance(error, JobFailed)
    assert error.explains_itself
    assert "job 7 FAILED" in str(error)
    assert "ZeroDivisionError: oh" in str(error)


def test_a_killed_job_shows_the_end_of_its_log(tmp_path: Path) -> None:
    job = submitted(tmp_path)
    assert "was not written" in ended(job, "CANCELLED").said
    job.log.write_text("".join(f"line {number}\n" for number in range(100)) + "Out Of Memory\n")
    end = ended(job, "OUT_OF_MEMORY")
    assert end.outcome is Outcome.failed
    assert end.said.endswith("Out Of Memory")
    assert "line 10\n" not in end.said


def test_waiting_survives_a_requeue_and_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter(["PENDING", "RUNNING", "NODE_FAIL", "PENDING", "RUNNING", "UNREACHABLE", "RUNNING", "COMPLETED"])
    monkeypatch.setattr(slurm_submit, "states", lambda ids: {job_id: State(next(script)) for job_id in ids})
    job = submitted(tmp_path)
    job.result.write_bytes(pickle.dumps(("success", None)))
    (end,) = wait([job], sleep=lambda seconds: None)
    assert end.outcome is Outcome.done


@pytest.mark.parametrize(("state", "patience"), [("NODE_FAIL", "RETURN_S"), ("UNREACHABLE", "OUTAGE_S")])
def test_a_job_that_does_not_come_back_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, patience: str
) -> None:
    monkeypatch.setattr(slurm_submit, patience, 0.05)
    monkeypatch.setattr(slurm_queue, "RESULT_DELAY_S", 0.05)
    monkeypatch.setattr(slurm_submit, "states", lambda ids: {job_id: State(state) for job_id in ids})
    (end,) = wait([submitted(tmp_path)], sleep=lambda seconds: None)
    assert (end.state, end.outcome) == (state, Outcome.failed)


def test_more_than_a_partition_has_is_refused(programs: Path) -> None:
    answers(programs, "sinfo", "debug*|4\ndebug*|8\nbig|64\n")
    assert cpus_of_nodes(None) == [4, 8]
    slurm_submit._check_nodes(SlurmCluster(nodes=2), SlurmQueue())
    slurm_submit._check_nodes(SlurmCluster(nodes=1, cpus_per_node=64), SlurmQueue(partition="big"))
    with pytest.raises(PreflightError, match="has 2 nodes, the largest with 8 CPUs, and 1 that will do"):
        slurm_submit._check_nodes(SlurmCluster(nodes=2, cpus_per_node=6), SlurmQueue())


def test_what_the_site_and_the_cluster_ask_for_is_in_the_script(programs: Path, tmp_path: Path) -> None:
    answers(programs, "sbatch", "Submitted batch job 7\n")
    answers(programs, "srun", "")
    answers(programs, "sinfo", "", error="not asked about here")
    queue = SlurmQueue(
        partition="gpu",
        account="lab",
        qos="high",
        timeout_min=90,
        mem_gb=1.5,
        constraint="h100",
        nodelist="n1,n2",
        exclude="n3",
        exclusive=True,
        comment="mine",
        setup=["module load cuda"],
        srun_args=["--mpi=none"],
        additional_parameters={"mail-type": "END"},
        array_parallelism=1,
        signal_delay_s=60,
    )
    cluster = SlurmCluster(nodes=2, gpus_per_node=8, cpus_per_node=96, max_restarts=3)
    config = Config(name="run", megatron=MegatronConfig(), teacher=ResidentTeacher(), cluster=cluster)
    jobs = slurm_submit.submit([ToRun(config, tmp_path / name) for name in ("a", "b")], queue, tmp_path / "slurm")
    assert [(job.id, job.directory) for job in jobs] == [("7_0", tmp_path / "a"), ("7_1", tmp_path / "b")]
    (script,) = (tmp_path / "slurm").rglob("*submission.sh")
    lines = script.read_text().splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {
        *("job-name=run", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=96", "requeue"),
        *("partition=gpu", "account=lab", "qos=high", "time=90", "mem=1536M", "constraint=h100", "nodelist=n1,n2"),
        *("exclude=n3", "exclusive", "comment=mine", "mail-type=END", "array=0-1%1", "signal=USR2@60"),
    } <= asked
    assert lines.index("module load cuda") < lines.index("export SRUN_CPUS_PER_TASK=96")
    (srun,) = (line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1 --mpi=none" in srun
    assert any('"${SLURM_RESTART_COUNT:-0}" -lt 3' in line for line in lines)


def test_nothing_is_known_without_sinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_queue.cpus_of_nodes(None) == []


def test_frozen_code_is_what_python_imports(tmp_path: Path) -> None:
    code = freeze_code(tmp_path)
    assert freeze_code(tmp_path) == code
    elsewhere = tmp_path / "elsewhere" / "opd_trainer"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").write_text("raise SystemExit('the working directory was imported')")
    look = f"{sys.executable} -c 'import opd_trainer.tracking.provenance as p; print(p.__file__); print(p.git_state())'"
    script = "\n".join([*code_lines(code), look])
    done = subprocess.run(
        ["bash", "-c", script], cwd=elsewhere.parent, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    file, git = done.stdout.splitlines()
    assert Path(file).is_relative_to(code)
    assert (code / "git.json").read_text().strip() in (git.replace("'", '"').lower(), "null")
