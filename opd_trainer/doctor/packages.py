"""Which packages are installed, and whether they can be imported.

Each is imported in a process of its own: one that was built for another torch or another CUDA can end its process.
"""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement

DISTRIBUTION = "opd-trainer"
IMPORT_TIMEOUT_S = 300.0
PROBE = """
import importlib, importlib.metadata, sys
try:
    print(importlib.metadata.version(sys.argv[1]), flush=True)
except importlib.metadata.PackageNotFoundError:
    sys.exit()
importlib.import_module(sys.argv[2])
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A package to look for.

    Attributes:
        name: of the distribution.
        module: what is imported of it.
    """

    name: str
    module: str


NEEDED = (
    Wanted("torch", "torch"),
    Wanted("megatron-core", "megatron.core.models.gpt"),
    Wanted("transformers", "transformers"),
    Wanted("datasets", "datasets"),
    Wanted("math-verify", "math_verify"),
    Wanted("ray", "ray"),
    Wanted("submitit", "submitit"),
    Wanted("wandb", "wandb"),
)
OPTIONAL = (
    Wanted("triton", "triton"),
    Wanted("transformer-engine", "transformer_engine.pytorch"),
    Wanted("flash-attn", "flash_attn"),
    Wanted("apex", "apex"),
)
SGLANG = Wanted("sglang", "sglang.srt.server_args")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What became of looking for a package.

    Attributes:
        name: of the distribution.
        version: None where it is not installed.
        accepted: versions that the project allows, "" where it names none.
        error: why it cannot be imported; None where it can, or is not installed.
    """

    name: str
    version: str | None
    accepted: str = ""
    error: str | None = None

    @property
    def works(self) -> bool:
        """It is there and can be imported."""
        return self.version is not None and self.error is None

    @property
    def other_version(self) -> bool:
        """Its version is none of `accepted`."""
        if self.version is None or not self.accepted:
            return False
        return not Requirement(f"{self.name}{self.accepted}").specifier.contains(self.version, prereleases=True)

    @property
    def complaint(self) -> str:
        """What is wrong with it, "" where nothing is."""
        if self.version is None:
            return f"{self.name} is not installed"
        return f"{self.name} {self.version} cannot be imported: {self.error}" if self.error else ""


def accepted_versions(distribution: str = DISTRIBUTION) -> dict[str, str]:
    """Package -> versions, as this project's installation names them; empty where it is not installed."""
    try:
        parsed = [Requirement(text) for text in requires(distribution) or ()]
    except PackageNotFoundError:
        return {}
    return {requirement.name: str(requirement.specifier) for requirement in parsed}


async def probe(wanted: Wanted, accepted: Mapping[str, str], python: str = sys.executable) -> Package:
    """Looks for one package in the environment of a Python."""
    version, error = None, None
    try:
        process = await asyncio.create_subprocess_exec(
            *(python, "-c", PROBE, wanted.name, wanted.module), stdout=PIPE, stderr=PIPE
        )
    except OSError as reason:
        return Package(name=wanted.name, version=None, error=f"{python}: {reason.strerror}")
    try:
        out, said = await asyncio.wait_for(process.communicate(), IMPORT_TIMEOUT_S)
        version = (out.decode(errors="replace").split() or [None])[0]
        error = ended_with(process.returncode or 0, said.decode(errors="replace"))
    except TimeoutError:
        process.kill()
        await process.wait()
        error = f"not done after {IMPORT_TIMEOUT_S:.0f} s"
    return Package(name=wanted.name, version=version, accepted=accepted.get(wanted.name, ""), error=error)


def ended_with(code: int, said: str) -> str | None:
    """Why a process failed, in a line; None where it did not."""
    if code == 0:
        return None
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code < 0:
        return f"its process ended with {signal.Signals(-code).name}"
    return lines[-1] if lines else f"its process ended with code {code}"


async def look_for(wanted: Iterable[Wanted], accepted: Mapping[str, str]) -> dict[str, Package]:
    """Looks for packages in our own environment, as many at once as there are CPUs."""
    at_once = asyncio.Semaphore(len(os.sched_getaffinity(0)))

    async def one(package: Wanted) -> Package:
        async with at_once:
            return await probe(package, accepted)

    return {package.name: package for package in await asyncio.gather(*map(one, wanted))}
