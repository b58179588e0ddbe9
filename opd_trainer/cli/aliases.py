"""slime's and Relax's flag spellings, rewritten into ours before Hydra reads the command line.

Both `opd_kl_coef=0.5` and `--opd-kl-coef 0.5` are understood; values may be comma sweeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from opd_trainer.errors import Problem

KEYS = {
    "opd_type": "opd",
    "opd_kl_coef": "opd.kl_coef",
    "opd_only_reward": "opd.only_reward",
    "opd_log_prob_top_k": "opd.log_prob_top_k",
    "opd_teacher_load": "teacher.load",
    "opd_teacher_ckpt_step": "teacher.ckpt_step",
    "opd_teacher_timeout_s": "teacher.timeout_s",
    "rm_url": "teacher.url",
    "advantage_estimator": "estimator",
    "custom_rm_path": "reward.path",
}
SHORT = {"sweep_dir": "task.sweep_dir"}
"""Spellings of our own."""
SWITCH = "use_opd"
BARE = frozenset({SWITCH, "opd_only_reward"})
"""Flags that take no value where they are spelled with dashes."""


@dataclass(frozen=True, slots=True)
class Expanded:
    """A command line in our spelling.

    Attributes:
        argv: the rewritten arguments.
        use_opd: `use_opd=true` was given, which names no type.
        problems: flags that contradict each other.
    """

    argv: list[str]
    use_opd: bool
    problems: list[Problem]


def _undash(argv: Sequence[str]) -> list[str]:
    """`--opd-kl-coef 0.5` and `--opd-kl-coef=0.5` -> `opd_kl_coef=0.5`; everything else stays."""
    plain: list[str] = []
    rest = iter(argv)
    for token in rest:
        name, equals, value = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not token.startswith("--") or (name not in KEYS and name != SWITCH):
            plain.append(token)
        elif equals:
            plain.append(f"{name}={value}")
        else:
            plain.append(f"{name}={'true' if name in BARE else next(rest, '')}")
    return plain


def _switch_problem(value: str) -> Problem:
    return Problem(
        key=SWITCH,
        what=f"{value!r} was given",
        why="it is true or false",
        fix="Set use_opd=true with opd_type=megatron, or sweep over types: opd=off,megatron",
    )


def expand(argv: Sequence[str]) -> Expanded:
    """Rewrites every alias of `argv`."""
    ours: list[str] = []
    switches: list[str] = []
    types: list[str] = []
    for token in _undash(argv):
        name, equals, value = token.partition("=")
        if equals and name == SWITCH:
            switches.append(value.lower())
        elif equals and name == "opd_type":
            types.append(value)
        elif equals and name in KEYS | SHORT:
            ours.append(f"{(KEYS | SHORT)[name]}={value}")
        else:
            ours.append(token)
    problems = [_switch_problem(value) for value in switches if value not in ("true", "false")]
    off = "false" in switches
    if off and types:
        problems.append(
            Problem(
                SWITCH, f"false together with opd_type={types[0]}", "they contradict each other", "Drop one of them"
            )
        )
    ours += [f"opd={value}" for value in types]
    if off and not types:
        ours.append("opd=off")
    # slime's type "sglang" is a server at --rm-url, and --custom-rm-path a reward of its own: each implies an option.
    if "sglang" in types and not any(token.startswith("teacher=") for token in ours):
        ours.append("teacher=sglang_external")
    if any(token.startswith("reward.path=") for token in ours) and not any(
        token.startswith("reward=") for token in ours
    ):
        ours.append("reward=custom")
    return Expanded(ours, "true" in switches, problems)
