"""Settings of an evaluation that cannot work, found before anything starts."""

from opd_trainer.errors import Problem
from opd_trainer.eval.config import EvalConfig


def eval_problems(config: EvalConfig) -> list[Problem]:
    """What is wrong with how held-out prompts are answered."""
    if config.samples_per_prompt <= 1 or config.temperature != 0:
        return []
    return [
        Problem(
            "eval.samples_per_prompt",
            f"{config.samples_per_prompt} with eval.temperature=0",
            "greedy decoding gives the same response every time",
            "Set eval.samples_per_prompt=1, or eval.temperature=0.6",
        )
    ]
