"""What the user named, as opposed to what the demo fills in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override

from opd_trainer.cli.composition import Composer

DEMO = "arithmetic"
"""The default experiment. What it sets does not count as named."""


@dataclass(frozen=True, slots=True)
class Named:
    """Keys and groups that the user named in overrides, in an experiment of theirs, or by an option that says them.

    Attributes:
        keys: dotted keys; a group counts as the key of its own name.
        use_opd: `use_opd=true` was given.
    """

    keys: frozenset[str] = frozenset()
    use_opd: bool = False

    def __contains__(self, key: str) -> bool:
        return any(named == key or named.startswith(f"{key}.") for named in self.keys)


def flatten(value: Any, prefix: str) -> Iterator[str]:
    """Dotted keys of the leaves of `value`."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix


def _named_by_option(composer: Composer, group: str, option: str, package: str) -> Iterator[str]:
    if group == "experiment" and option == DEMO:
        return
    values, defaults = composer.option_file(group, option)
    yield from flatten(values, package) if values else ()
    for path, value, is_override in defaults:
        if is_override:
            yield path.lstrip("/")
            if isinstance(value, str):
                yield from _named_by_option(composer, path.lstrip("/"), value, path.lstrip("/"))
        elif path not in ("_self_",) and not path.startswith("/schema"):
            yield from _named_by_option(composer, group, path, package)


def named_by(composer: Composer, overrides: Sequence[Override], use_opd: bool) -> Named:
    """What `overrides` name, directly or through the option files that they choose."""
    keys: set[str] = set()
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if composer.is_group(key):
            package = "" if key in ("experiment", "debug") else override.package or key
            keys.add(override.package or key)
            if isinstance(value, str):
                keys.update(_named_by_option(composer, key, value, package))
        else:
            keys.update(flatten(value, key))
    return Named(frozenset(keys), use_opd)
