"""Whole runs of `launch.py`, small: random models with the demo's tokenizer, a few steps."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd_trainer.cli.entry import main
from opd_trainer.demo import arithmetic
from opd_trainer.demo.config import DemoConfig
from opd_trainer.megatron.families.registry import architecture_from_config
from opd_trainer.model.config import ArchitectureConfig, Family
from tests.megatron.models import hf_model

ROOT = Path(__file__).parents[2]
SHAPE = ArchitectureConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, max_length=64
)
LIMIT_S = 900.0
"""On a run in a process of its own; generous, since other work may keep the machine busy."""
KILLS = 5
"""How often a run may be done before it is killed."""


def save_model(folder: Path, seed: int, family: Family = Family.qwen3) -> Path:
    """A random model with the demo's tokenizer."""
    architecture = architecture_from_config(replace(SHAPE, family=family), len(arithmetic.VOCABULARY))
    hf_model(architecture, seed).save_pretrained(folder)
    arithmetic.save_tokenizer(folder)
    return folder


def world(folder: Path) -> Path:
    """Data, a student and a teacher; the teacher differs from the student."""
    arithmetic.write_dataset(folder / "data", DemoConfig(num_train=64, num_heldout=8))
    save_model(folder / "student", 1)
    save_model(folder / "teacher", 2)
    return folder


def arguments(world: Path, output: Path, *overrides: str) -> list[str]:
    """A command line for a few steps in `output`."""
    return [
        "experiment=null",
        f"model.load={world / 'student'}",
        f"data.path={world / 'data' / 'train.jsonl'}",
        f"eval.datasets.heldout.path={world / 'data' / 'heldout.jsonl'}",
        "eval.reverse_kl_prompts=4",
        "steps=3",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=2",
        "rollout.max_prompt_tokens=16",
        "rollout.max_response_tokens=12",
        "megatron.optimizer.lr=1e-3",
        "tracking.console=false",
        f"output_dir={output}",
        *overrides,
    ]


def distil(world: Path, teacher: str = "teacher") -> tuple[str, ...]:
    """Overrides that switch distillation on."""
    return ("opd=megatron", f"teacher.load={world / teacher}")


def launch(world: Path, output: Path, *overrides: str) -> int:
    """Runs in this process and returns the exit code."""
    return main(ROOT / "conf", arguments(world, output, *overrides))


def start(world: Path, output: Path, *overrides: str) -> subprocess.Popen[str]:
    """Runs `launch.py` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *arguments(world, output, *overrides)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=world,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def lines(output: Path) -> int:
    """Steps that a run has written down."""
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_after(world: Path, output: Path, after: int, *overrides: str) -> None:
    """Runs `launch.py` and kills it once it has written `after` of its steps.

    On a busy machine it may be done before we come to it; then all is begun anew.
    """
    (total,) = (int(override.removeprefix("steps=")) for override in overrides if override.startswith("steps="))
    for _ in range(KILLS):
        process, deadline = start(world, output, *overrides), time.monotonic() + LIMIT_S
        while process.poll() is None and lines(output) < after and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        printed, _ = process.communicate()
        assert lines(output) >= after, printed
        if lines(output) < total:
            return
        shutil.rmtree(output)
    raise AssertionError(f"{KILLS} runs of {total} steps were done before they could be killed after {after}")


def steps(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock; one that is being written is none yet."""
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("perf/")}
        for line in (output / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    ]


def column(output: Path, name: str) -> Iterator[float]:
    """One metric, step by step."""
    return (line[name] for line in steps(output))


def summary(output: Path) -> dict[str, Any]:
    """The content of summary.json."""
    return json.loads((output / "summary.json").read_text())
