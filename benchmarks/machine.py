"""Where figures were measured, and of which code: processor, cores, memory, how busy the machine was, commit."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from opd_trainer.doctor.machine import memory_limit
from opd_trainer.tracking.provenance import package_versions

ROOT = Path(__file__).resolve().parents[1]
CODE = ("launch.py", "opd_trainer", "hydra_plugins", "conf")
"""What a run runs; a change elsewhere does not change its figures."""
CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The model's name, as far as the system tells it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What stands beside every figure; the load average is that of the last minute."""
    limit, total = memory_limit(), psutil.virtual_memory().total
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round((total if limit is None else min(limit, total)) / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "load_average": round(os.getloadavg()[0], 1),
    }


def code_state(*more: str) -> dict[str, Any] | None:
    """Commit, and whether `CODE` and `more` differ from it; None outside a checkout."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if commit.returncode != 0:
        return None
    return {"commit": commit.stdout.strip(), "changed": not same_code(commit.stdout.strip(), *more)}


def same_code(commit: str, *more: str) -> bool:
    """Whether `CODE` and `more` are those of a commit."""
    differs = subprocess.run(["git", "diff", "--quiet", commit, "--", *CODE, *more], cwd=ROOT, check=False)
    return differs.returncode == 0


def shortened(argument: str) -> str:
    """An argument without the folders of a path on this machine, which say nothing elsewhere."""
    return re.sub(r"(^|=)/(?:[^/=]+/)*([^/=]+)/?$", r"\1\2", argument)


def measuring() -> Callable[[Path, Any], None]:
    """To be called before a measurement: what writes its figures with command, code, versions and machine."""
    before, code, start = machine(), code_state("benchmarks"), datetime.now(UTC).isoformat(timespec="seconds")

    def write(path: Path, figures: Any) -> None:
        content = {
            "command": " ".join(["python", *map(shortened, sys.orig_argv[1:])]),
            "start": start,
            "code": code,
            "versions": package_versions(),
            "machine": {**before, "load_average": [before["load_average"], machine()["load_average"]]},
            "figures": figures,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    return write
