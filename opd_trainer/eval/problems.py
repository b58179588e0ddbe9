"""Settings of an evaluation that cannot work, found before anything starts."""

from opd_trainer.errors import Problem
from opd_trainer.eval.config import EvalConfig


def eval_problems(config: EvalConfig) -> list[Problem]:
    """What is wrong with how held-out prompts are answered."""
    if config.temperature != 0:
        return []
    found = []
    if config.samples_per_prompt > 1:
        found.append(
            Problem(
                "eval.samples_per_prompt",
                f"{config.samples_per_prompt} with eval.temperature=0",
                "greedy decoding gives the same response every time",
                "Set eval.samples_per_prompt=1, or eval.temperature=0.6",
            )
        )
    for name, value, everything in (("top_p", config.top_p, 1.0), ("top_k", config.top_k, 0)):
        if value != everything:
            found.append(
                Problem(
                    f"eval.{name}",
                    f"{value:g} with eval.temperature=0",
                    "greedy decoding takes the likeliest token, whatever else could be sampled",
                    f"Set eval.temperature=0.6, or eval.{name}={everything:g}",
                )
            )
    return found
