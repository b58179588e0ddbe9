"""TRL's side of `benchmarks.vs_trl`: on-policy distillation by its DistillationTrainer, timed phase by phase.

Runs in TRL's Python, which has none of our packages: python distill.py SETTINGS.json RESULT.json

The phases are taken around TRL's own methods, from outside: `_generate` (prompts in, tokens out), the forward pass of
the teacher's and of the student's layers (`_get_last_hidden_state`), all of `compute_loss` and `accelerator.backward`.
Both output heads and the divergence are one function of TRL's, so that they count as its loss. A step is what lies
between `on_step_begin` and `on_step_end`: everything but fetching rows. Saving the student is not part of it.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Phases:
    """Seconds of a step by phase."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.steps: list[dict[str, float]] = []
        self._seconds: dict[str, float] = {}
        self._began = 0.0

    def timed(self, name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose seconds count for the phase that `name` gives its arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began, phase = self.clock(), name(*args)
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[phase] = self._seconds.get(phase, 0.0) + self.clock() - began

        return call

    def begin(self) -> None:
        """A step begins."""
        self._seconds, self._began = {}, self.clock()

    def end(self, **counts: float) -> None:
        """It ended."""
        self.steps.append({"step_s": self.clock() - self._began, **self._seconds, **counts})


class Snapshots(TrainerCallback):
    """Books each step and saves the student after it."""

    def __init__(self, phases: Phases, folder: Path) -> None:
        self.phases, self.folder = phases, folder
        self.trainer: DistillationTrainer | None = None
        self.tokens = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self.phases.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stops it."""
        assert self.trainer is not None
        self.phases.end(tokens=self.tokens)
        self.trainer.model.save_pretrained(self.folder / f"step_{state.global_step}")


def make_trainer(settings: dict[str, Any], callback: Snapshots, folder: Path) -> DistillationTrainer:
    """TRL's trainer in its fast setting: autocast, no gradient checkpointing, the cache on while generating."""
    rows = [json.loads(line) for line in Path(settings["data"]).read_text(encoding="utf-8").splitlines()]
    optimizer = settings["optimizer"]
    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=1,
        max_steps=settings["steps"],
        max_completion_length=settings["response_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=1.0,
        learning_rate=optimizer["lr"],
        adam_beta1=optimizer["beta1"],
        adam_beta2=optimizer["beta2"],
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=optimizer["clip_grad"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        bf16=settings["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        seed=settings["seed"],
        # Frozen weights need no float32 copy.
        teacher_model_init_kwargs={"dtype": settings["dtype"]},
    )
    return DistillationTrainer(
        model=settings["student"],
        teacher_model=settings["teacher"],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(settings["student"], padding_side="left"),
        callbacks=[callback],
    )


def instrument(trainer: DistillationTrainer, phases: Phases, callback: Snapshots, dtypes: set[str]) -> None:
    """Puts clocks around TRL's methods."""
    generate, last_hidden = trainer._generate, trainer._get_last_hidden_state

    def counted(prompts: Any) -> Any:
        found = generate(prompts)
        callback.tokens = sum(len(completion) for completion in found[1])
        return found

    def noted(model: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = last_hidden(model, *args, **kwargs)
        dtypes.add(str(hidden.dtype))
        return hidden

    def whose(model: Any, *_: Any) -> str:
        return "student_s" if model.training else "teacher_s"

    compute_loss = trainer.compute_loss

    def autocast_loss(*args: Any, **kwargs: Any) -> Any:
        # accelerate's autocast is around `forward`, which TRL's loss goes past in a single process.
        with trainer.accelerator.autocast():
            return compute_loss(*args, **kwargs)

    trainer._generate = phases.timed(lambda *_: "generation_s", counted)
    trainer._get_last_hidden_state = phases.timed(whose, noted)
    trainer.compute_loss = phases.timed(lambda *_: "loss_s", autocast_loss)
    trainer.accelerator.backward = phases.timed(lambda *_: "backward_s", trainer.accelerator.backward)


def main() -> None:
    """Trains as the first file says and writes what was measured into the second."""
    settings_file, result_file = map(Path, sys.argv[1:])
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    folder, phases, dtypes = result_file.parent, Phases(CLOCKS[settings["clock"]]), set[str]()
    callback = Snapshots(phases, folder)
    trainer = make_trainer(settings, callback, folder)
    callback.trainer = trainer
    instrument(trainer, phases, callback, dtypes)
    trainer.train()
    result = {
        "steps": phases.steps,
        "hidden_dtypes": sorted(dtypes),
        "max_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "threads": torch.get_num_threads(),
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    result_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
