"""What a run amounts to: `summary.json`, which other programs read."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto
from pathlib import Path
from typing import Any

from opd_trainer.files import write_atomically


class Evaluated(StrEnum):
    """Whose answers a held-out evaluation graded."""

    before = auto()
    """The student before the first step."""
    after = auto()
    """The student after the last step."""
    teacher = auto()
    """The teacher."""


@dataclass(slots=True)
class Results:
    """The held-out figures of a run so far.

    Attributes:
        evaluation: pass@1 by dataset, of everybody who was evaluated.
        standard_error: of these, where there are several prompts.
        reverse_kl: mean reverse KL per token on fixed held-out prompts, nats, of the student before and after.
        reference_nll: negative log-likelihood per token of reference responses by dataset, nats.
    """

    evaluation: dict[Evaluated, dict[str, float]] = field(default_factory=dict)
    standard_error: dict[Evaluated, dict[str, float]] = field(default_factory=dict)
    reverse_kl: dict[Evaluated, float] = field(default_factory=dict)
    reference_nll: dict[Evaluated, dict[str, float]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "evaluation": {who.value: dict(scores) for who, scores in self.evaluation.items()},
            "standard_error": {who.value: dict(errors) for who, errors in self.standard_error.items()},
            "reverse_kl": {who.value: value for who, value in self.reverse_kl.items()},
            "reference_nll": {who.value: dict(values) for who, values in self.reference_nll.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.evaluation = {Evaluated(who): dict(scores) for who, scores in state["evaluation"].items()}
        self.standard_error = {Evaluated(who): dict(errors) for who, errors in state["standard_error"].items()}
        self.reverse_kl = {Evaluated(who): value for who, value in state["reverse_kl"].items()}
        self.reference_nll = {Evaluated(who): dict(values) for who, values in state["reference_nll"].items()}

    def deltas(self) -> dict[str, dict[str, float]]:
        """Dataset -> pass@1 after minus before, with its standard error where it is known.

        The two are taken for independent; on the same prompts they rise and fall together, so that it is rather less.
        """
        before, after = (self.evaluation.get(who, {}) for who in (Evaluated.before, Evaluated.after))
        found = {}
        for name in sorted(before.keys() & after.keys()):
            found[name] = {"value": after[name] - before[name]}
            errors = [self.standard_error.get(who, {}).get(name) for who in (Evaluated.before, Evaluated.after)]
            if None not in errors:
                found[name]["standard_error"] = math.hypot(*(error for error in errors if error is not None))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The content of `summary.json`.

    Attributes:
        results: held-out figures.
        steps: optimizer steps done, those before a resume included.
        wall_s: seconds by phase, see `opd_trainer.tracking.wall_time`.
        config_hash: fingerprint of the configuration.
        git: commit and whether the checkout was dirty; None outside a checkout.
        versions: of Python and the packages that matter.
    """

    results: Results
    steps: int
    wall_s: Mapping[str, float]
    config_hash: str
    git: Mapping[str, Any] | None
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The documented shape; what was not measured is null, or missing from its mapping of datasets."""
        evaluation, reverse_kl, nll = self.results.evaluation, self.results.reverse_kl, self.results.reference_nll
        return finite(
            {
                "evaluation": {who.value: evaluation.get(who, {}) for who in Evaluated},
                "standard_error": {who.value: self.results.standard_error.get(who, {}) for who in Evaluated},
                "delta": self.results.deltas(),
                "reverse_kl": {"first": reverse_kl.get(Evaluated.before), "last": reverse_kl.get(Evaluated.after)},
                "reference_nll": {who.value: nll.get(who, {}) for who in Evaluated},
                **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "results"},
            }
        )

    def write(self, path: Path) -> None:
        """Writes the JSON; a reader sees the old file or the new one, never half of it."""
        write_atomically(path, json.dumps(self.to_json(), indent=2) + "\n")


def finite(value: Any) -> Any:
    """`value` with None in place of NaN and infinities, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
