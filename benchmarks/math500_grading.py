r"""The gold answers of MATH-500, graded against themselves and against each other's, as `reward=math` grades a run.

Writes docs/results/math500_grading.md. The file has one object per line, with the gold answer as `answer` (as Hugging
Face has it) or `label`.

Run: python -m benchmarks.math500_grading MATH-500.jsonl
"""

import argparse
import asyncio
import json
import math
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opd_trainer.reward.config import MathReward
from opd_trainer.reward.pool import RewardPool
from opd_trainer.types import Finish, Prompt, Sample

PAGE = Path(__file__).parents[1] / "docs" / "results" / "math500_grading.md"
FORMS = {r"`\boxed{}`": "So the answer is \\boxed{{{0}}}.", "`Answer:`": "So this is it.\nAnswer: ${0}$"}
SHUFFLES = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Graded:
    """A list of answers, graded against a list of gold answers.

    Attributes:
        answers: as given, without their sentence.
        golds: what each was compared with.
        rewards: 1, 0 or NaN where the comparison failed.
        seconds: for all of them, one process.
    """

    answers: Sequence[str]
    golds: Sequence[str]
    rewards: Sequence[float]
    seconds: float

    @property
    def correct(self) -> int:
        """Answers judged to be the gold answer."""
        return sum(reward == 1 for reward in self.rewards)

    @property
    def failed(self) -> int:
        """Comparisons without a result."""
        return sum(math.isnan(reward) for reward in self.rewards)

    @property
    def identical(self) -> int:
        """Answers that are their gold answer, character by character."""
        return sum(answer == gold for answer, gold in zip(self.answers, self.golds, strict=True))

    @property
    def alike(self) -> list[tuple[str, str]]:
        """Answers judged to be their gold answer although written differently."""
        pairs = zip(self.answers, self.golds, self.rewards, strict=True)
        return [(answer, gold) for answer, gold, reward in pairs if reward == 1 and answer != gold]


async def grade(form: str, answers: Sequence[str], golds: Sequence[str]) -> Graded:
    """Grades answers in sentences of the given form."""
    pool = RewardPool(MathReward(), 1)
    try:
        # The process that compares starts with its first question.
        await pool.score(_sample(form.format("1"), "1", -1))
        samples = [_sample(form.format(a), g, i) for i, (a, g) in enumerate(zip(answers, golds, strict=True))]
        started = time.perf_counter()
        scored = await asyncio.gather(*(pool.score(sample) for sample in samples))
        seconds = time.perf_counter() - started
    finally:
        await pool.close()
    return Graded(answers, golds, [sample.reward for sample in scored], seconds)


def _sample(text: str, gold: str, number: int) -> Sample:
    return Sample(
        prompt=Prompt(id=str(number), tokens=torch.tensor([0]), text="", answer=gold),
        index=0,
        response=torch.tensor([0]),
        log_probs=torch.zeros(1),
        finish=Finish.stop,
        version=0,
        text=text,
    )


def read_golds(path: Path) -> list[str]:
    """The gold answers of a file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [str(row["answer"] if "answer" in row else row["label"]) for row in rows]


def shuffled(golds: Sequence[str], seed: int) -> list[str]:
    """The same answers in another order."""
    order = list(golds)
    random.Random(seed).shuffle(order)
    return order


def page(own: dict[str, Graded], others: dict[int, Graded]) -> str:
    """The text of docs/results/math500_grading.md."""
    total = len(next(iter(own.values())).golds)
    lines = [
        "# MATH-500, graded",
        "",
        f"The {total} gold answers of MATH-500 as responses, graded by `reward=math` in one process.",
        "`python -m benchmarks.math500_grading MATH-500.jsonl`",
        "",
        "| answers | written as | judged correct | judged wrong | no result | time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for form, graded in own.items():
        lines.append(_row("each its own", form, graded))
    for seed, graded in others.items():
        lines.append(_row(f"shuffled, seed {seed}", next(iter(FORMS)), graded))
    lines += ["", "Shuffled answers that were judged correct:", ""]
    for seed, graded in others.items():
        pairs = "; ".join(f"`{answer}` for `{gold}`" for answer, gold in graded.alike) or "none"
        lines.append(f"* seed {seed}: {graded.identical} are identical to the gold answer, others: {pairs}")
    lines += ["", f"Time on {platform.machine()}, one process of Python {platform.python_version()}, start excluded."]
    return "\n".join(lines) + "\n"


def _row(answers: str, form: str, graded: Graded) -> str:
    total = len(graded.golds)
    wrong = total - graded.correct - graded.failed
    return f"| {answers} | {form} | {graded.correct} / {total} | {wrong} | {graded.failed} | {graded.seconds:.1f} s |"


async def measure(golds: Sequence[str]) -> str:
    """Grades everything; the page."""
    own = {name: await grade(form, golds, golds) for name, form in FORMS.items()}
    boxed = next(iter(FORMS.values()))
    others = {seed: await grade(boxed, shuffled(golds, seed), golds) for seed in SHUFFLES}
    return page(own, others)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="MATH-500 as JSONL")
    PAGE.write_text(asyncio.run(measure(read_golds(parser.parse_args().file))), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
