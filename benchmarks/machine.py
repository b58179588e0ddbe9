"""Where figures were measured: processor, cores, memory, and how busy the machine was."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from opd_trainer.doctor.machine import memory_limit

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
