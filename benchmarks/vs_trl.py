"""Our trainer and TRL's DistillationTrainer side by side: the same models, prompts, batch, lengths and precision.

    python -m benchmarks.vs_trl --trl-python PY --student DIR --teacher DIR --data FILE [--steps N] [--json FILE]

PY is a Python with TRL (scripts/trl_cpu/build.sh prints one); FILE has one object a line with a `question` or a
`prompt`. Each side runs in a process of its own, one after the other; a side whose result is in --work already is not
run again.

* Seconds are of the median step, the first left out. `generation`: prompts in, tokens out. `teacher`: TRL, the forward
  pass of its layers; ours, that and its head, once. `update`: the rest of the step, weight sync included.
* On a busy machine use `--clock cpu --threads 1`: both sides tell the CPU time of their process, on one thread.
* Memory is the largest resident set of the side's whole process tree, start and end of the run included.
* The reverse KL is measured for all by `benchmarks.held_out_kl`, on prompts that nobody trained on: after the same
  number of samples, and TRL's also after the step at which it had spent most nearly as long as ours did in all.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.held_out_kl import held_out_kl
from benchmarks.machine import measuring, shortened
from benchmarks.process_memory import watch
from opd_trainer.data.stream import PromptStream
from opd_trainer.model.folder import EXPORTED
from opd_trainer.tracking.files import METRICS, read_rows
from opd_trainer.types import Prompt

ROOT = Path(__file__).resolve().parents[1]
PEER = "trl"
OBJECTIVES = {"reverse_kl": "ours, whole distributions", "sampled": "ours, sampled tokens"}
"""Values of opd.divergence.kind, the one that TRL has first."""
ON_CPU_TIME = """
import runpy, time
time.perf_counter = time.process_time
runpy.run_path("launch.py", run_name="__main__")
"""
"""launch.py on a clock that stands still while others have the processor."""
OPTIMIZER = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "clip_grad": 1.0}
SETTINGS = {"steps", "batch", "response_tokens", "dtype", "lr", "seed", "held_out", "clock", "threads", "override"}
"""Options that are kept beside the figures: none that is a path."""
WARM_UP = 1
COLUMNS = {"step_s": "step", "generation_s": "generation", "teacher_s": "teacher", "update_s": "update"}


@dataclass(frozen=True, slots=True)
class Side:
    """What one side did.

    Attributes:
        steps: seconds by phase and `tokens`, of each step.
        peak_gib: largest resident set of its processes.
        students: Hugging Face folders by the number of steps that they have learned.
        details: whatever else it tells.
    """

    steps: list[dict[str, float]]
    peak_gib: float
    students: dict[int, str]
    details: dict[str, Any]

    def medians(self) -> dict[str, float]:
        """Median of each phase over the steps after the warm-up."""
        late = self.steps[WARM_UP:]
        return {name: statistics.median(step.get(name, 0.0) for step in late) for name in (*COLUMNS, "tokens")}

    @property
    def seconds(self) -> list[float]:
        """Spent on steps, after each."""
        return list(itertools.accumulate(step["step_s"] for step in self.steps))


def our_step(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step of ours, from its line in metrics.jsonl."""
    step, generation, teacher = (row.get(f"perf/{name}_time", 0.0) for name in ("step", "rollout", "teacher"))
    return {
        "step_s": step,
        "generation_s": generation,
        "teacher_s": teacher,
        "update_s": step - generation - teacher,
        "sync_s": row.get("perf/sync_time", 0.0),
        "tokens": round(row["perf/tokens_per_s"] * step),
    }


def peer_step(step: Mapping[str, float]) -> dict[str, float]:
    """A step of TRL's with its `update_s`: all that is neither generation nor the teacher's layers."""
    return {**step, "update_s": step["step_s"] - step["generation_s"] - step["teacher_s"]}


def messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row's prompt as chat messages."""
    found = row["question"] if "question" in row else row["prompt"]
    return found if isinstance(found, list) else [{"role": "user", "content": found}]


def drawn_order(rows: int, seed: int) -> list[int]:
    """The order in which our stream draws the rows of a file in its first epoch."""
    prompts = [Prompt(id=str(index), tokens=torch.zeros(1, dtype=torch.int64), text="") for index in range(rows)]
    return [int(prompt.id) for prompt in PromptStream.of(prompts, seed).next(rows)]


def write_rows(path: Path, prompts: Sequence[Any]) -> None:
    """One object with a `prompt` a line."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


def overrides(options: argparse.Namespace, kind: str, data: Path, output: Path) -> list[str]:
    """What is typed after `python launch.py`."""
    return [
        "experiment=null",
        "name=vs_trl",
        "estimator=none",
        "reward=none",
        "opd=megatron",
        f"opd.divergence.kind={kind}",
        f"model.load={options.student}",
        f"teacher.load={options.teacher}",
        "+model@teacher.model=base",
        *(f"{model}.dtype={options.dtype}" for model in ("model", "teacher.model")),
        f"data.path={data}",
        "data.label_key=null",
        f"rollout.prompts_per_step={options.batch}",
        "rollout.samples_per_prompt=1",
        f"rollout.max_response_tokens={options.response_tokens}",
        f"steps={options.steps}",
        f"megatron.optimizer.lr={options.lr}",
        *(f"megatron.optimizer.{name}={value}" for name, value in OPTIMIZER.items()),
        "eval.every=0",
        "eval.teacher=false",
        "checkpoint.every=0",
        f"output_dir={output}",
        *options.override,
    ]


def run_ours(options: argparse.Namespace, kind: str, data: Path, work: Path) -> Side:
    """Our side, through launch.py."""
    output = work / f"ours_{kind}"
    typed = overrides(options, kind, data, output)
    script = ["-c", ON_CPU_TIME] if options.clock == "cpu" else [str(ROOT / "launch.py")]
    watched = watch([sys.executable, *script, *typed], work / f"ours_{kind}.log", environment(options), ROOT)
    rows = read_rows(output / METRICS)
    return Side(
        [our_step(row) for row in rows],
        watched.peak_gib,
        {len(rows): str(output / EXPORTED)},
        {"wall_s": watched.seconds, "overrides": typed},
    )


def run_peer(options: argparse.Namespace, data: Path, work: Path) -> Side:
    """TRL's side, in its own Python."""
    folder = work / PEER
    folder.mkdir(exist_ok=True)
    settings, result = folder / "settings.json", folder / "result.json"
    shared = ("student", "teacher", "dtype", "batch", "response_tokens", "steps", "seed", "clock")
    asked = {name: getattr(options, name) for name in shared}
    optimizer = {"lr": options.lr, **OPTIMIZER}
    settings.write_text(json.dumps({**asked, "optimizer": optimizer, "data": str(data)}, indent=2))
    clean = {name: value for name, value in environment(options).items() if name != "PYTHONPATH"}
    side = ROOT / "scripts" / "trl_cpu" / "distill.py"
    watched = watch([options.trl_python, str(side), str(settings), str(result)], work / f"{PEER}.log", clean)
    found = json.loads(result.read_text(encoding="utf-8"))
    steps = [peer_step(step) for step in found.pop("steps")]
    students = {number: str(folder / f"step_{number}") for number in range(1, len(steps) + 1)}
    return Side(steps, watched.peak_gib, students, {"wall_s": watched.seconds, **found})


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Of both sides."""
    threads = {} if options.threads is None else {"OMP_NUM_THREADS": str(options.threads)}
    return {**os.environ, **threads}


def nearest(peer: Side, seconds: float) -> int | None:
    """The step after which the peer had spent most nearly `seconds` on steps; None if it ended long before."""
    after = peer.seconds
    if seconds > after[-1] + max(step["step_s"] for step in peer.steps):
        return None
    return 1 + min(range(len(after)), key=lambda index: abs(after[index] - seconds))


def kept(path: Path, make: Any) -> Side:
    """The side that `path` holds, or that `make` makes and `path` then holds."""
    if not path.exists():
        path.write_text(json.dumps(dataclasses.asdict(make()), indent=2) + "\n", encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    return Side(**{**found, "students": {int(step): at for step, at in found["students"].items()}})


def table(sides: Mapping[str, Side], reverse_kl: Mapping[str, Any]) -> str:
    """Both sides as a Markdown table; the last columns compare with TRL."""
    head = ["", *(f"{title}, s" for title in COLUMNS.values()), "peak, GiB", "times as fast", "of its memory"]
    lines = [head, ["---"] * len(head)]
    peer = sides[PEER]
    for name, side in sides.items():
        medians = side.medians()
        figures = [f"{medians[column]:.2f}" for column in COLUMNS]
        faster = peer.medians()["step_s"] / medians["step_s"]
        share = side.peak_gib / peer.peak_gib
        lines.append([name, *figures, f"{side.peak_gib:.2f}", f"{faster:.2f}", f"{share:.0%}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    for name, found in reverse_kl.items():
        text += f"\n{name}: reverse KL {found['reverse_kl']:.3f} +- {found['standard_error']:.3f}"
    return text


def measure_kl(options: argparse.Namespace, sides: Mapping[str, Side], prompts: Sequence[Any]) -> dict[str, Any]:
    """Held-out reverse KL of every student, and of the one that they started from."""
    students = {"start": options.student}
    students |= {f"{name}, equal samples": side.students[len(side.steps)] for name, side in sides.items()}
    for name, side in sides.items():
        step = nearest(sides[PEER], side.seconds[-1])
        if name != PEER and step is not None:
            students[f"{PEER}, step {step}, about the time of {name}"] = sides[PEER].students[step]
    found = {}
    for name, student in students.items():
        held_out = held_out_kl(Path(student), options.teacher, prompts, options.response_tokens)
        found[name] = dataclasses.asdict(held_out)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--student", type=os.path.abspath, required=True)
    parser.add_argument("--teacher", type=os.path.abspath, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=64, help="prompts, from the end of the file; 0 measures no KL")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, help="of PyTorch, on both sides; all cores if not given")
    parser.add_argument("--override", action="append", default=[], help="of ours, e.g. model.dtype=float32")
    parser.add_argument("--work", type=Path, help="folder to keep everything in")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def told(details: Mapping[str, Any]) -> dict[str, Any]:
    """Details of a side without the folders of this machine."""
    return {name: [*map(shortened, value)] if name == "overrides" else value for name, value in details.items()}


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Runs what is not in `work` yet, and measures."""
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    needed = options.steps * options.batch
    if len(rows) < needed + options.held_out:
        raise SystemExit(f"{options.data}: {len(rows)} rows, and {needed + options.held_out} are needed: lower --steps")
    train = [messages(row) for row in rows[:needed]]
    write_rows(work / "ours.jsonl", train)
    # Ours shuffles, TRL is told not to: it gets the rows in the order in which ours draws them.
    write_rows(work / "trl.jsonl", [train[index] for index in drawn_order(needed, 0)])
    sides = {}
    for kind, title in OBJECTIVES.items():
        sides[title] = kept(work / f"{kind}.json", lambda kind=kind: run_ours(options, kind, work / "ours.jsonl", work))
    sides[PEER] = kept(work / f"{PEER}.json", lambda: run_peer(options, work / "trl.jsonl", work))
    held_out = [messages(row) for row in rows[len(rows) - options.held_out :]]
    reverse_kl = measure_kl(options, sides, held_out) if held_out else {}
    print(table(sides, reverse_kl))
    return {
        "settings": {name: value for name, value in vars(options).items() if name in SETTINGS},
        "sides": {
            name: {"median": side.medians(), "peak_gib": side.peak_gib, "steps": side.steps, **told(side.details)}
            for name, side in sides.items()
        },
        "reverse_kl": reverse_kl,
    }


def main() -> None:
    options, write = parse(), measuring()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        found = compare(options, work.resolve())
    if options.json:
        write(options.json, found)


if __name__ == "__main__":
    main()
