"""What the machine has: processors, memory, GPUs, disks and commands."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from opd_trainer.cluster.rendezvous import free_port
from opd_trainer.megatron.c_compiler import c_compiler, has_python_headers

COMMANDS = ("git", "make", "nvidia-smi", "sbatch", "srun", "squeue", "sacct", "scontrol")
COMMAND_TIMEOUT_S = 20.0
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Limit on the memory of a container: of cgroups in version 2 and in version 1."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        name: its model.
        capability: compute capability.
        free: bytes that nobody uses; None where it could not be asked.
        total: bytes.
    """

    name: str
    capability: tuple[int, int]
    free: int | None
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is.

    Attributes:
        system: operating system and processor.
        cpus: that this process may use.
        memory_free: bytes of host memory that are available.
        memory_total: bytes of host memory, or of the container's limit where that is less.
        gpus: those that torch can use.
        cuda: version that torch was built for; None for a build without CUDA.
        cuda_complaint: what torch said when it could use no GPU, "" where it said nothing.
        disks: folder -> free bytes.
        shared_memory: free bytes of /dev/shm; None where there is none.
        commands: command -> its path, None where it is missing.
        compiler: path of the C compiler for kernels, None where there is none.
        python_headers: whether Python.h is there.
        open_files: limit of this process.
        host_name: of the machine.
        host_address: what the name resolves to, None where it does not.
        loopback: why no port could be opened on 127.0.0.1, None where one could.
        partitions: SLURM's; None where it was not asked, for want of its commands.
        slurm_complaint: why SLURM did not answer, "" where it did or was not asked.
    """

    system: str
    cpus: int
    memory_free: int
    memory_total: int
    gpus: tuple[Gpu, ...]
    cuda: str | None
    cuda_complaint: str
    disks: Mapping[str, int]
    shared_memory: int | None
    commands: Mapping[str, str | None]
    compiler: str | None
    python_headers: bool
    open_files: int
    host_name: str
    host_address: str | None
    loopback: str | None
    partitions: tuple[str, ...] | None
    slurm_complaint: str


def examine(folders: Sequence[Path]) -> Machine:
    """Looks at this machine; nothing is changed.

    Args:
        folders: whose disks matter; they need not exist.
    """
    memory = psutil.virtual_memory()
    limit = memory_limit()
    total = memory.total if limit is None else min(limit, memory.total)
    gpus, cuda_complaint = gpus_of_torch()
    commands = {name: shutil.which(name) for name in COMMANDS}
    partitions, slurm_complaint = ask_slurm() if commands["sbatch"] else (None, "")
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)),
        memory_free=min(memory.available, total),
        memory_total=total,
        gpus=gpus,
        cuda=torch.version.cuda,
        cuda_complaint=cuda_complaint,
        disks={str(folder): free_space(folder) for folder in folders},
        shared_memory=free_space(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None,
        commands=commands,
        compiler=c_compiler(),
        python_headers=has_python_headers(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        host_name=socket.gethostname(),
        host_address=host_address(),
        loopback=loopback(),
        partitions=partitions,
        slurm_complaint=slurm_complaint,
    )


def memory_limit(files: Sequence[Path] = CGROUP_LIMITS) -> int | None:
    """Bytes that the container may use, None without a limit."""
    for file in files:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None


def gpus_of_torch() -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that torch can use, and what it said where there is none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        return (), " ".join(str(warning.message).split(" (Triggered")[0] for warning in said)
    return tuple(gpu(number) for number in range(torch.cuda.device_count())), ""


def gpu(number: int) -> Gpu:
    """One of them."""
    properties = torch.cuda.get_device_properties(number)
    try:
        free, _ = torch.cuda.mem_get_info(number)
    except RuntimeError:
        free = None
    capability = (properties.major, properties.minor)
    return Gpu(name=properties.name, capability=capability, free=free, total=properties.total_memory)


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder, or of where it would be made."""
    absolute = folder.absolute()
    return shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free


def host_address() -> str | None:
    """What the machine's own name resolves to."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def loopback() -> str | None:
    """Why no port can be opened on 127.0.0.1, where process groups and servers meet."""
    try:
        free_port()
    except OSError as error:
        return str(error)
    return None


def ask_slurm() -> tuple[tuple[str, ...], str]:
    """SLURM's partitions, and why it did not answer."""
    command = ["sinfo", "--noheader", "--format=%R"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), str(error)
    if done.returncode != 0:
        return (), (done.stderr.strip().splitlines() or [f"sinfo ended with {done.returncode}"])[-1]
    return tuple(dict.fromkeys(done.stdout.split())), ""
