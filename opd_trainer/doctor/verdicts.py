"""From what is here to what works here: what each part of the command line needs, and what helps where it lacks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto

from opd_trainer.doctor.machine import Machine
from opd_trainer.doctor.packages import NEEDED, Package

ROOM_BYTES = 2**30
"""Free space below which a disk is worth a word; the demo needs far less, a real model's checkpoints far more."""
SHARED_MEMORY_BYTES = 2**28
SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
BFLOAT16_CAPABILITY = (8, 0)
"""The first compute capability whose GPUs multiply bfloat16."""
INSTALL = "make setup, or: pip install -e . -c constraints.txt"


class Answer(StrEnum):
    """Whether something works."""

    yes = auto()
    partly = auto()
    """It works, with something to know."""
    no = auto()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a part of the command line works here.

    Attributes:
        use: what one would type.
        answer: whether it works.
        why: with what, or what is missing.
        fix: what would help, "" where nothing is missing.
    """

    use: str
    answer: Answer
    why: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that was looked at.

    Attributes:
        machine: this one.
        packages: by name, in our own environment.
        servers: Python -> SGLang as it is there.
        wandb_key: where wandb's key was found, None where it was not.
    """

    machine: Machine
    packages: Mapping[str, Package]
    servers: Mapping[str, Package]
    wandb_key: str | None


def verdicts(facts: Facts) -> list[Verdict]:
    """Every verdict, in the order of the README's table of groups."""
    return [
        *core(facts),
        bfloat16(facts.machine),
        *log_probs(facts),
        attention(facts),
        *ray(facts),
        slurm(facts),
        Verdict("opd=sglang teacher=sglang_external", Answer.yes, "asks a server of yours: teacher.url=http://..."),
        *(sglang(python, found, facts.machine) for python, found in facts.servers.items()),
        reward_math(facts),
        tracking(facts),
        *disks(facts.machine),
    ]


def complaints(facts: Facts, *names: str) -> list[str]:
    """What is wrong with some packages."""
    return [facts.packages[name].complaint for name in names if facts.packages[name].complaint]


def core(facts: Facts) -> Iterator[Verdict]:
    """Training in this process, with the teachers that share it."""
    machine = facts.machine
    use = "cluster=inprocess with teacher=resident, offload or swap"
    wrong = complaints(facts, "torch", "megatron-core", "transformers", "datasets")
    other = [facts.packages[wanted.name] for wanted in NEEDED if facts.packages[wanted.name].other_version]
    if wrong:
        yield Verdict(use, Answer.no, "; ".join(wrong), INSTALL)
    elif machine.loopback is not None:
        why = f"no port can be opened on 127.0.0.1 ({machine.loopback}), where process groups meet"
        yield Verdict(use, Answer.no, why, "allow connections of this machine with itself")
    elif other:
        versions = ", ".join(f"{package.name} {package.version} is not {package.accepted}" for package in other)
        yield Verdict(use, Answer.partly, f"not tested with these versions: {versions}", INSTALL)
    elif machine.gpus:
        yield Verdict(use, Answer.yes, f"on {machine.gpus[0].name}")
    else:
        yield Verdict(use, Answer.yes, f"on the CPU, {machine.cpus} cores")
    if not machine.gpus:
        yield no_gpu(machine)


def no_gpu(machine: Machine) -> Verdict:
    """Why no GPU is used."""
    use = "training on a GPU"
    if machine.commands["nvidia-smi"] is None:
        return Verdict(use, Answer.no, "this machine has no NVIDIA driver (no nvidia-smi)", "run on a machine with one")
    if machine.cuda is None:
        why = "there is a driver, but torch is the build for CPUs"
        return Verdict(use, Answer.no, why, "rm -r .venv and make setup without TORCH_INDEX")
    said = machine.cuda_complaint or "torch sees none: CUDA_VISIBLE_DEVICES may hide them"
    return Verdict(use, Answer.no, said, f"look at nvidia-smi; torch was built for CUDA {machine.cuda}")


def bfloat16(machine: Machine) -> Verdict:
    """Half the memory for weights and activations."""
    use = "model.dtype=bfloat16"
    old = [gpu for gpu in machine.gpus if gpu.capability < BFLOAT16_CAPABILITY]
    if not old:
        return Verdict(use, Answer.yes, "GPUs compute it" if machine.gpus else "on the CPU: measure before you use it")
    capability = ".".join(map(str, old[0].capability))
    why = f"{old[0].name} (compute capability {capability}) only emulates it"
    return Verdict(use, Answer.partly, why, "model.dtype=float32, or a GPU of capability 8.0 or newer")


def log_probs(facts: Facts) -> Iterator[Verdict]:
    """The kernel of log-probs, which is built on the machine that runs it, when it is first needed."""
    machine, triton = facts.machine, facts.packages["triton"]
    if not machine.gpus:
        return
    use = "log-probs on a GPU by the kernel"
    slow = "without it they take many times as long"
    if triton.complaint:
        yield Verdict(use, Answer.no, f"{triton.complaint}; {slow}", "install torch's build for CUDA, which brings it")
    elif machine.compiler is None:
        why = f"Triton builds it when a run starts, with a C compiler, and there is none; {slow}"
        yield Verdict(use, Answer.no, why, "apt-get install gcc, or name a compiler in the variable CC")
    elif not machine.python_headers:
        why = f"Triton builds it when a run starts, and {machine.compiler} finds no Python.h: the run would fail"
        yield Verdict(use, Answer.no, why, "apt-get install python3-dev")
    else:
        yield Verdict(use, Answer.yes, f"Triton {triton.version} builds it with {machine.compiler}")


def attention(facts: Facts) -> Verdict:
    """Transformer Engine, which is used by itself where it is there."""
    use = "model.attention_backend=te"
    engine = facts.packages["transformer-engine"]
    without = "nothing is lost but speed: attention_backend=auto takes torch's kernels"
    if not facts.machine.gpus:
        return Verdict(use, Answer.no, "Transformer Engine needs a GPU", without)
    if engine.version is None:
        fix = "pip install --no-build-isolation 'transformer-engine[pytorch]'"
        return Verdict(use, Answer.no, f"it is not installed; {without}", fix)
    if engine.error is not None:
        # With attention_backend=auto it would be chosen, and fail.
        why = f"{engine.complaint}; attention_backend=auto would choose it"
        return Verdict(use, Answer.no, why, "model.attention_backend=torch, or build it for this torch and CUDA")
    return Verdict(use, Answer.yes, f"Transformer Engine {engine.version}; attention_backend=auto takes it")


def ray(facts: Facts) -> Iterator[Verdict]:
    """Workers in processes of their own."""
    machine = facts.machine
    use = "cluster=ray, teacher=dedicated"
    wrong = complaints(facts, "ray")
    devices = f"{len(machine.gpus)} GPUs" if machine.gpus else f"{machine.cpus} CPUs and no GPU"
    if wrong:
        yield Verdict(use, Answer.no, wrong[0], INSTALL)
    elif machine.shared_memory is not None and machine.shared_memory < SHARED_MEMORY_BYTES:
        why = f"/dev/shm has {machine.shared_memory // 2**20} MiB: Ray falls back to the disk, which is slow"
        yield Verdict(use, Answer.partly, why, "docker run --shm-size=8g")
    elif len(machine.gpus) > 1:
        why = f"over {devices}; several GPUs are among what nobody has tried yet"
        yield Verdict(use, Answer.partly, why, "see docs/verified.md")
    else:
        yield Verdict(use, Answer.yes, f"over {devices}")


def slurm(facts: Facts) -> Verdict:
    """Submitting from here."""
    use = "cluster=slurm"
    machine = facts.machine
    missing = [name for name in SLURM_COMMANDS if machine.commands[name] is None]
    if missing:
        fix = "run this on a login node of the cluster, or apt-get install slurm-client munge there"
        return Verdict(use, Answer.no, f"{', '.join(missing)} not found: not a node of a SLURM cluster", fix)
    wrong = complaints(facts, "submitit", "ray")
    if wrong:
        return Verdict(use, Answer.no, "; ".join(wrong), INSTALL)
    if machine.slurm_complaint:
        fix = "is munged at work, and slurmctld reachable? `scontrol ping` tells"
        return Verdict(use, Answer.no, f"SLURM does not answer: {machine.slurm_complaint}", fix)
    partitions = ", ".join(machine.partitions or ()) or "none"
    if machine.host_address is None:
        why = f"partitions {partitions}; the name {machine.host_name} resolves to no address, as nodes' names must"
        return Verdict(use, Answer.partly, why, "name the machine in /etc/hosts or in DNS")
    return Verdict(use, Answer.yes, f"partitions {partitions}")


def sglang(python: str, found: Package, machine: Machine) -> Verdict:
    """Servers that we launch, from an environment of their own."""
    use = "teacher=sglang_managed, rollout=sglang"
    if found.version is None:
        why = found.error or f"{python} has no sglang"
        fix = "an environment of its own, named by teacher.launch.python and rollout.launch.python (docs/sglang.md)"
        return Verdict(use, Answer.no, why, fix)
    if found.error is not None:
        return Verdict(use, Answer.no, f"in {python}: {found.complaint}", "see docs/sglang.md for versions that work")
    where = "on GPUs" if machine.gpus else "on the CPU, slowly"
    return Verdict(use, Answer.yes, f"sglang {found.version} of {python}, {where}")


def reward_math(facts: Facts) -> Verdict:
    """The reward with a grammar behind it."""
    use = "reward=math"
    wrong = complaints(facts, "math-verify")
    return Verdict(use, Answer.no, wrong[0], INSTALL) if wrong else Verdict(use, Answer.yes, "math-verify is installed")


def tracking(facts: Facts) -> Verdict:
    """Metrics in wandb."""
    wrong = complaints(facts, "wandb")
    if wrong:
        return Verdict("tracking=wandb, wandb_offline", Answer.no, wrong[0], INSTALL)
    if facts.wandb_key is None:
        why = "no key in WANDB_API_KEY or .netrc; tracking=wandb_offline works"
        return Verdict("tracking=wandb", Answer.no, why, "wandb login, or tracking=wandb_offline and wandb sync later")
    return Verdict(
        "tracking=wandb, wandb_offline", Answer.yes, f"key from {facts.wandb_key}; the network was not tried"
    )


def disks(machine: Machine) -> Iterator[Verdict]:
    """Room for what runs write."""
    for folder, free in machine.disks.items():
        if free < ROOM_BYTES:
            why = f"only {free // 2**20} MiB are free"
            yield Verdict(f"writing to {folder}", Answer.partly, why, "make room, or set output_dir or demo.cache")
