"""What works, for machines that are not this one."""

import dataclasses
from typing import Any

import pytest

from opd_trainer.doctor.machine import COMMANDS, Gpu, Machine
from opd_trainer.doctor.packages import NEEDED, OPTIONAL, Package
from opd_trainer.doctor.verdicts import Answer, Facts, Verdict, verdicts

H200 = Gpu(name="NVIDIA H200", capability=(9, 0), free=140 * 2**30, total=141 * 2**30)
V100 = Gpu(name="Tesla V100", capability=(7, 0), free=None, total=32 * 2**30)
LAPTOP = Machine(
    system="Linux",
    cpus=2,
    memory_free=2**33,
    memory_total=2**34,
    gpus=(),
    cuda=None,
    cuda_complaint="",
    disks={"outputs": 2**40},
    shared_memory=2**33,
    commands=dict.fromkeys(COMMANDS),
    compiler=None,
    python_headers=True,
    open_files=1024,
    host_name="laptop",
    host_address="127.0.1.1",
    loopback=None,
    partitions=None,
    slurm_complaint="",
)
LOGIN_NODE = dataclasses.replace(LAPTOP, commands=dict.fromkeys(COMMANDS, "/usr/bin/x"), partitions=("long", "short"))
INSTALLED = {wanted.name: Package(name=wanted.name, version="1.0") for wanted in NEEDED}
ABSENT = {wanted.name: Package(name=wanted.name, version=None) for wanted in OPTIONAL}
PYTHON = "/env/bin/python"
FACTS = Facts(
    machine=LAPTOP,
    packages=INSTALLED | ABSENT,
    servers={PYTHON: Package(name="sglang", version=None)},
    wandb_key=None,
)


def facts(package: Package | None = None, server: Package | None = None, **machine: Any) -> Facts:
    return dataclasses.replace(
        FACTS,
        machine=dataclasses.replace(LAPTOP, **machine),
        packages=FACTS.packages if package is None else {**FACTS.packages, package.name: package},
        servers=FACTS.servers if server is None else {PYTHON: server},
    )


def about(use: str, of: Facts) -> Verdict:
    (found,) = [one for one in verdicts(of) if one.use.startswith(use)]
    return found


def test_a_laptop() -> None:
    answers = {one.use: one.answer for one in verdicts(FACTS)}
    assert answers == {
        "cluster=inprocess with teacher=resident, offload or swap": Answer.yes,
        "training on a GPU": Answer.no,
        "model.dtype=bfloat16": Answer.yes,
        "model.attention_backend=te": Answer.no,
        "cluster=ray, teacher=dedicated": Answer.yes,
        "cluster=slurm": Answer.no,
        "opd=sglang teacher=sglang_external": Answer.yes,
        "teacher=sglang_managed, rollout=sglang": Answer.no,
        "reward=math": Answer.yes,
        "tracking=wandb": Answer.no,
    }


def test_what_does_not_work_has_a_reason_and_a_fix() -> None:
    for one in verdicts(FACTS):
        assert one.why
        assert bool(one.fix) == (one.answer is not Answer.yes), one


def test_a_gpu() -> None:
    found = facts(gpus=(H200,), cuda="12.8")
    assert "on NVIDIA H200" in about("cluster=inprocess", found).why
    assert not [one for one in verdicts(found) if one.use == "training on a GPU"]
    assert about("model.dtype", found).answer is Answer.yes
    assert about("cluster=ray", found).answer is Answer.yes


def test_several_gpus_are_told_to_be_untried() -> None:
    found = about("cluster=ray", facts(gpus=(H200, H200)))
    assert found.answer is Answer.partly
    assert "2 GPUs" in found.why
    assert "docs/verified.md" in found.fix


def test_a_gpu_that_emulates_bfloat16() -> None:
    found = about("model.dtype", facts(gpus=(H200, V100)))
    assert found.answer is Answer.partly
    assert "Tesla V100 (compute capability 7.0)" in found.why


def test_the_kernel_of_log_probs() -> None:
    triton = Package(name="triton", version="3.6")
    here: dict[str, Any] = {"gpus": (H200,), "compiler": "/usr/bin/cc"}
    found = about("log-probs", facts(triton, **here))
    assert (found.answer, found.why) == (Answer.yes, "Triton 3.6 builds it with /usr/bin/cc")
    for lacking, reason, fix in (
        (facts(triton, gpus=(H200,)), "with a C compiler, and there is none", "CC"),
        (facts(triton, **here, python_headers=False), "/usr/bin/cc finds no Python.h", "python3-dev"),
        (facts(**here), "triton is not installed", "torch's build for CUDA"),
    ):
        found = about("log-probs", lacking)
        assert found.answer is Answer.no
        assert reason in found.why
        assert fix in found.fix


@pytest.mark.parametrize(
    ("cuda", "said", "reason"),
    [
        (None, "", "the build for CPUs"),
        ("12.8", "", "CUDA_VISIBLE_DEVICES"),
        ("12.8", "The NVIDIA driver is too old", "The NVIDIA driver is too old"),
    ],
)
def test_why_a_gpu_is_not_used(cuda: str | None, said: str, reason: str) -> None:
    commands = {**LAPTOP.commands, "nvidia-smi": "/usr/bin/nvidia-smi"}
    found = about("training on a GPU", facts(cuda=cuda, cuda_complaint=said, commands=commands))
    assert found.answer is Answer.no
    assert reason in found.why


def test_transformer_engine() -> None:
    engine = Package(name="transformer-engine", version="2.5")
    broken = dataclasses.replace(engine, error="undefined symbol: x")
    assert about("model.attention_backend", facts(engine, gpus=(H200,))).answer is Answer.yes
    assert about("model.attention_backend", facts(engine)).answer is Answer.no
    found = about("model.attention_backend", facts(broken, gpus=(H200,)))
    assert found.answer is Answer.no
    assert "undefined symbol: x" in found.why
    assert "model.attention_backend=torch" in found.fix


def test_a_broken_package() -> None:
    found = about("cluster=inprocess", facts(Package(name="megatron-core", version="0.16.1", error="ImportError: y")))
    assert found.answer is Answer.no
    assert found.why == "megatron-core 0.16.1 cannot be imported: ImportError: y"


def test_another_version() -> None:
    found = about("cluster=inprocess", facts(Package(name="megatron-core", version="0.21", accepted=">=0.16,<0.20")))
    assert found.answer is Answer.partly
    assert "megatron-core 0.21 is not >=0.16,<0.20" in found.why


def test_no_loopback() -> None:
    assert about("cluster=inprocess", facts(loopback="Operation not permitted")).answer is Answer.no


def test_little_shared_memory() -> None:
    found = about("cluster=ray", facts(shared_memory=64 * 2**20))
    assert found.answer is Answer.partly
    assert "64 MiB" in found.why


def test_slurm() -> None:
    login = dataclasses.replace(FACTS, machine=LOGIN_NODE)
    assert about("cluster=slurm", login) == Verdict("cluster=slurm", Answer.yes, "partitions long, short")
    silent = dataclasses.replace(LOGIN_NODE, slurm_complaint="Munge decode failed", partitions=())
    found = about("cluster=slurm", dataclasses.replace(FACTS, machine=silent))
    assert found.answer is Answer.no
    assert "Munge decode failed" in found.why
    nameless = dataclasses.replace(LOGIN_NODE, host_address=None)
    assert about("cluster=slurm", dataclasses.replace(FACTS, machine=nameless)).answer is Answer.partly


def test_sglang_in_its_environment() -> None:
    there = about("teacher=sglang_managed", facts(server=Package(name="sglang", version="0.5.5")))
    assert there.answer is Answer.yes
    assert PYTHON in there.why
    broken = about("teacher=sglang_managed", facts(server=Package(name="sglang", version="0.5.5", error="no module x")))
    assert broken.answer is Answer.no
    assert "no module x" in broken.why


def test_wandb() -> None:
    assert about("tracking=", dataclasses.replace(FACTS, wandb_key="WANDB_API_KEY")).answer is Answer.yes
    absent = facts(Package(name="wandb", version=None))
    assert about("tracking=", absent).use == "tracking=wandb, wandb_offline"


def test_a_full_disk() -> None:
    found = about("writing to", facts(disks={"outputs": 2**40, "checkpoints": 2**20}))
    assert found.use == "writing to checkpoints"
    assert found.answer is Answer.partly
