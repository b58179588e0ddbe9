"""Ray over the nodes of a SLURM job: every task of the job, one per node, starts its node's part.

Rank 0 starts the head, tells its address and token in a file that only the user can read, and runs the controller; the
others join and stay until it is done. Nothing here ends a Ray that is not ours (`ray stop` would), so that two jobs can
share a node, and nothing outlives its task: the kernel kills what a killed task leaves behind.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from opd_trainer.cluster import die_with_parent
from opd_trainer.cluster.rendezvous import free_port
from opd_trainer.errors import WorkerError

POLL_S = 0.2
STOP_S = 10.0
OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""Object store of a node: batches and weight buckets pass through it one at a time."""
RAY = (sys.executable, "-m", "ray.scripts.scripts", "start")
LOG_TAIL = 2000
PROMPT = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # A node that is gone is noticed after five of these.
    "RAY_health_check_period_ms": "1000",
}
"""Makes Ray end, and notice ends, within seconds."""


@dataclass(frozen=True, slots=True)
class JobTask:
    """One task of a SLURM job, as SLURM's environment describes it.

    Attributes:
        rank: 0 for the one that runs the controller.
        nodes: of the job.
        attempt: names the job and how often it has been started.
        address: under which other nodes reach this one.
        cpus: of this node that the job may use.
        gpus: likewise, as CUDA_VISIBLE_DEVICES names them.
    """

    rank: int
    nodes: int
    attempt: str
    address: str
    cpus: int
    gpus: tuple[str, ...]


def this_task(environment: Mapping[str, str] = os.environ) -> JobTask:
    """The task that this process is.

    Raises:
        WorkerError: this is no SLURM job.
    """
    if "SLURM_JOB_ID" not in environment:
        raise WorkerError("SLURM_JOB_ID is not set: this process was not started by SLURM")
    devices = environment.get("CUDA_VISIBLE_DEVICES", "")
    return JobTask(
        rank=int(environment.get("SLURM_PROCID", "0")),
        nodes=int(environment.get("SLURM_NNODES", "1")),
        attempt=f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}",
        address=_node_address(environment.get("SLURMD_NODENAME")),
        cpus=int(environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or "1"),
        gpus=tuple(device for device in devices.split(",") if device),
    )


def _node_address(name: str | None) -> str:
    """What SLURM's configuration says where the node is, which need not be what its own name resolves to."""
    if name is not None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            shown = subprocess.run(
                ["scontrol", "show", "node", name, "-o"], capture_output=True, text=True, check=True, timeout=30
            ).stdout
            said = dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)
            return socket.gethostbyname(said.get("NodeAddr", name))
    return socket.gethostbyname(name or socket.gethostname())


class _Part:
    """This node's part of Ray: one process with its children."""

    def __init__(self, arguments: list[str], task: JobTask, token: str, log: Path) -> None:
        self._log = log
        command = [
            *(sys.executable, "-I", str(die_with_parent.__file__), str(os.getpid())),
            *RAY,
            f"--node-ip-address={task.address}",
            f"--num-cpus={task.cpus}",
            f"--num-gpus={len(task.gpus)}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
            "--block",
            *arguments,
        ]
        environment = os.environ | _token_variables(token) | PROMPT
        if task.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(task.gpus)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # What SLURM signals a task is for the task: it then ends its part in order.
                start_new_session=True,
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def tail(self) -> str:
        return f"{self._log}:\n{self._log.read_text(errors='replace')[-LOG_TAIL:]}"

    @property
    def lost_its_port(self) -> bool:
        return "Failed to start the grpc server" in self.tail

    def stop(self) -> None:
        if self.runs:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _token_variables(token: str) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _meeting_place(directory: Path, task: JobTask) -> Path:
    place = directory / f"ray-{task.attempt}"
    place.mkdir(parents=True, exist_ok=True)
    return place


@contextlib.contextmanager
def head(task: JobTask, directory: Path, timeout_s: float, taken: Collection[int] = ()) -> Iterator[str]:
    """Rank 0's part: the address of Ray inside, which this process's environment then names too.

    Args:
        task: this one.
        directory: of the job, shared by all nodes.
        timeout_s: limit on its start.
        taken: GPUs of this node that are not for Ray.

    Raises:
        WorkerError: Ray did not start.
    """
    task = dataclasses.replace(task, gpus=tuple(gpu for gpu in task.gpus if gpu not in map(str, taken)))
    place, token = _meeting_place(directory, task), secrets.token_hex(32)
    # Ray puts Unix sockets there, whose paths may have 107 characters.
    temp_dir = tempfile.mkdtemp(prefix="opd", dir="/tmp")
    variables = _token_variables(token)
    before = {name: os.environ.get(name) for name in (*variables, "RAY_ADDRESS")}
    part: _Part | None = None
    try:
        part, address = _answering_head(task, token, temp_dir, place / "node0.log", time.monotonic() + timeout_s)
        os.environ.update(variables | {"RAY_ADDRESS": address})
        _tell(place / "head.json", {"address": address, "token": token, "temp_dir": temp_dir})
        yield address
    finally:
        (place / "done").touch()
        (place / "head.json").unlink(missing_ok=True)
        if part is not None:
            part.stop()
        shutil.rmtree(temp_dir, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _answering_head(task: JobTask, token: str, temp_dir: str, log: Path, deadline: float) -> tuple[_Part, str]:
    """A head that answers, and its address. Another process may take a port in the moment between choice and use."""
    while True:
        port = free_port(task.address)
        arguments = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temp_dir}"]
        part = _Part(arguments, task, token, log)
        while part.runs and not _answers(task.address, port):
            if time.monotonic() > deadline:
                part.stop()
                raise WorkerError(f"Ray did not start on {task.address} in time: {part.tail}")
            time.sleep(POLL_S)
        if part.runs:
            return part, f"{task.address}:{port}"
        if time.monotonic() > deadline or not part.lost_its_port:
            raise WorkerError(f"Ray did not start on {task.address}: {part.tail}")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _tell(file: Path, content: dict[str, str]) -> None:
    partial = file.with_suffix(".partial")
    # The token opens Ray to whoever reads it.
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as output:
        json.dump(content, output)
    partial.replace(file)


def member(task: JobTask, directory: Path, timeout_s: float) -> None:
    """The part of every other rank: joins the head's Ray, and returns when rank 0 is done.

    Args:
        task: this one.
        directory: of the job, shared by all nodes.
        timeout_s: limit on finding the head, and on finding it again after this node's part died.

    Raises:
        WorkerError: there is no head, or this node's part does not stay alive.
    """
    place = _meeting_place(directory, task)
    deadline = time.monotonic() + timeout_s
    while not (place / "head.json").exists():
        if (place / "done").exists():
            return
        if time.monotonic() > deadline:
            raise WorkerError(f"rank 0 did not start Ray within {timeout_s:g} s: see its log")
        time.sleep(POLL_S)
    said = json.loads((place / "head.json").read_text())
    part: _Part | None = None
    try:
        while not (place / "done").exists():
            if part is None or not part.runs:
                if part is not None and time.monotonic() > deadline:
                    raise WorkerError(f"this node's part of Ray died: {part.tail}")
                part = _Part([f"--address={said['address']}"], task, said["token"], place / f"node{task.rank}.log")
            elif time.monotonic() > deadline:
                # It has come up; what dies later gets as long again.
                deadline = time.monotonic() + timeout_s
            time.sleep(POLL_S)
    finally:
        if part is not None:
            part.stop()
        shutil.rmtree(said["temp_dir"], ignore_errors=True)
