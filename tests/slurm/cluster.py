"""A throw-away SLURM cluster in a directory: daemons in the foreground, children of this process, no path of root's."""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
START_S = 300.0


@dataclass
class SlurmTestCluster:
    """Two (or more) nodes on one machine, at 127.0.1.1, 127.0.1.2, ..."""

    root: Path
    nodes: int = 2
    cpus: int = 4
    memory_mb: int = 8000
    env: dict[str, str] = field(default_factory=dict)
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def write(self) -> None:
        """The configuration."""
        for name in ("log", "state"):
            (self.root / name).mkdir(parents=True)
        # munged wants a directory that others can pass through.
        (self.root / "munge").mkdir()
        (self.root / "munge").chmod(0o711)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        ports = free_ports(self.nodes + 1)
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"SlurmctldPort={ports[0]}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.root}/munge/sock",
            f"StateSaveLocation={self.root}/state",
            f"SlurmdSpoolDir={self.root}/spool.%n",
            f"SlurmctldPidFile={self.root}/slurmctld.pid",
            f"SlurmdPidFile={self.root}/slurmd.%n.pid",
            f"SlurmctldLogFile={self.root}/log/slurmctld.log",
            f"SlurmdLogFile={self.root}/log/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0",
            "ReturnToService=2",
            "KillWait=20",
            "SlurmdTimeout=10",
            "MinJobAge=3600",
            # Nodes may claim more than this machine has.
            "SlurmdParameters=config_overrides",
            "MailProg=/bin/true",
            "AccountingStorageType=accounting_storage/none",
            "JobCompType=jobcomp/none",
            *(
                f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.1.{number} Port={ports[number]} "
                f"CPUs={self.cpus} RealMemory={self.memory_mb} State=UNKNOWN"
                for number in range(1, self.nodes + 1)
            ),
            "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]
        (self.root / "slurm.conf").write_text("\n".join(lines) + "\n")
        self.env = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def spawn(self, name: str, *command: str) -> None:
        """Starts a daemon in the foreground."""
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self) -> None:
        """Brings everything up, and waits until all nodes are idle."""
        folder = self.root / "munge"
        files = [
            f"--{option}={folder}/{name}"
            for option, name in (
                ("socket", "sock"),
                ("key-file", "key"),
                ("pid-file", "pid"),
                ("log-file", "log"),
                ("seed-file", "seed"),
            )
        ]
        self.spawn("munged", "munged", "-F", "--force", *files)
        deadline = time.monotonic() + START_S
        while not (folder / "sock").exists():
            assert self.daemons["munged"].poll() is None, (self.root / "log" / "munged.out").read_text()
            assert time.monotonic() < deadline, "munged does not start"
            time.sleep(0.02)
        self.spawn("slurmctld", "slurmctld", "-D")
        for number in range(1, self.nodes + 1):
            self.start_node(number)
        while len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) < self.nodes:
            assert time.monotonic() < deadline, (self.root / "log" / "slurmctld.log").read_text()
            time.sleep(0.1)

    def start_node(self, number: int) -> None:
        """Starts a node's daemon."""
        self.spawn(f"node{number}", "slurmd", "-D", "-N", f"node{number}")

    def kill_node(self, number: int) -> None:
        """What a power failure does: the node's daemon and all that it started are gone at once."""
        victims = family(self.daemons[f"node{number}"].pid) | self.steps_on(f"node{number}")
        for pid in sorted(victims):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[f"node{number}"].wait()

    def steps_on(self, node: str) -> set[int]:
        """The processes of job steps on a node, which do not descend from its daemon."""
        mine = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.root / 'slurm.conf'}"}
        tasks = {pid for pid, _, _ in processes() if mine <= variables(pid)}
        stepds = {pid for pid, _, command in processes() if "slurmstepd" in command and family(pid) & tasks}
        return tasks | stepds

    def run(self, *command: str) -> str:
        """The output of a command of SLURM's; "" where it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=300)
        return done.stdout if done.returncode == 0 else ""

    def show(self, job: str) -> dict[str, str]:
        """What scontrol says about a job."""
        lines = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(pair.split("=", 1) for pair in lines if "=" in pair)

    def state(self, job: str) -> str:
        """A job's state."""
        return self.show(job).get("JobState", "")

    def until(self, job: str, *wanted: str, timeout_s: float = 600.0) -> str:
        """Waits until a job has one of the states."""
        deadline = time.monotonic() + timeout_s
        while (now := self.state(job)) not in wanted:
            assert time.monotonic() < deadline, f"job {job} is {now}, not {wanted}"
            time.sleep(0.1)
        return now

    def start_now(self, job: str) -> None:
        """Starts a job that SLURM would let wait for a time."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        """Ends everything."""
        self.run("scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h", "-o", "%i") and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in reversed(self.daemons.values()):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def processes() -> Iterator[tuple[int, int, str]]:
    """(pid, parent, command line) of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            yield int(folder.name), int(after[1]), command


def family(root: int) -> set[int]:
    """A process with its children, their children, ..."""
    parents = {pid: parent for pid, parent, _ in processes()}
    found, size = {root}, 0
    while size < len(found):
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def variables(pid: int) -> set[str]:
    """NAME=VALUE of a process."""
    try:
        return set((Path("/proc") / str(pid) / "environ").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return set()
