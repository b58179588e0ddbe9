"""Every override checked before Hydra sees it: Hydra alone stops at its first problem, and accepts `+typo=1`."""

import difflib
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from opd_trainer.cli.composition import Composer
from opd_trainer.cli.schema import SCHEMAS
from opd_trainer.cli.schema_walk import Step, describe, field_names, known_keys, strip_optional, walk
from opd_trainer.config import Config
from opd_trainer.data.config import DataConfig
from opd_trainer.errors import ConfigError, OpdError, Problem
from opd_trainer.model.config import ModelConfig

MOUNTS = {ModelConfig: "model=base", DataConfig: "data=file"}
"""Schemas that appear when one of their keys is set: `eval.datasets.math.path=...` needs no `+data@...` before."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One command line without sweeps, looked at.

    Attributes:
        config: the configuration, None where there are problems that forbid building it.
        run_dir: where Hydra would put a single run of it; "" where there are problems.
        mounts: overrides that Hydra needs besides those of the user.
        added: keys of open dictionaries that are not there yet, for which Hydra wants `++`.
        parsed: the overrides that could be read.
        problems: everything that is wrong.
    """

    config: Config | None
    run_dir: str
    mounts: list[str]
    added: frozenset[str]
    parsed: list[Override]
    problems: list[Problem]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that lists the nearest of `known`, or how to see them all."""
    candidates = list(known)
    last = name.rpartition(".")[2]
    same_end = [key for key in candidates if key.rpartition(".")[2] == last]
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    ends = {key.rpartition(".")[2]: key for key in candidates}
    near_end = [ends[end] for end in difflib.get_close_matches(last, ends, n=2, cutoff=0.75)]
    found = list(dict.fromkeys([*same_end, *near, *near_end]))[:4]
    found.sort(key=lambda key: difflib.SequenceMatcher(None, name, key).ratio(), reverse=True)
    return f"Did you mean {' or '.join(found)}?" if found else "conf/README.md lists every key"


def parse_all(composer: Composer, overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides that can be read, and a problem for each that cannot."""
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            parsed.append(composer.parse(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            fix = "Write key=value, and put quotes around a value with special characters: 'key=\"a=b\"'"
            problems.append(Problem(text, "cannot be read", reason, fix))
    return parsed, problems


def is_hydras(override: Override) -> bool:
    """Whether it is for Hydra itself: `hydra.run.dir=...`, `hydra/launcher=...`."""
    return override.key_or_group.partition("/")[0].partition(".")[0] == "hydra"


def without_nulls(composer: Composer, override: Override) -> str:
    """`experiment=null` -> `~experiment`: Hydra has no other way to drop an option."""
    text = override.input_line or ""
    if override.is_sweep_override():
        return text
    if composer.is_group(override.key_or_group) and not is_hydras(override) and override.value() is None:
        return text if override.is_delete() else f"~{override.get_key_element().lstrip('+~')}"
    return text


def several_values(override: Override) -> Iterator[Problem]:
    """A sweep where a single run is meant."""
    if override.is_sweep_override():
        text = override.input_line or ""
        yield Problem(
            override.key_or_group, f"several values, {text}", "one run takes one", f"Add -m to run each: -m {text}"
        )


def group_problem(composer: Composer, override: Override) -> Problem | None:
    """An option that does not exist."""
    group, option = override.key_or_group, override.value()
    if option is None or override.is_delete():
        return None
    options = composer.options(group)
    if isinstance(option, str) and option in options:
        return None
    near = difflib.get_close_matches(str(option), options, n=3)
    hint = f"Did you mean {' or '.join(f'{group}={name}' for name in near)}? " if near else ""
    return Problem(
        group,
        f"{option!r} is not one of its options",
        f"conf/{group}/ has no such file",
        f"{hint}Options: {', '.join(options)}",
    )


def repeated(chosen: Sequence[Override]) -> Iterator[Problem]:
    """A group given two options. (Of a key given twice, the last value holds.)"""
    seen: dict[str, Override] = {}
    for override in chosen:
        key = f"{override.key_or_group}@{override.package}" if override.package else override.key_or_group
        if key in seen and not is_hydras(override):
            yield Problem(
                key,
                f"given twice, {seen[key].input_line} and {override.input_line}",
                "only one can hold",
                "Drop one of them",
            )
        seen[key] = override


def owners(step: Step, group: str) -> list[str]:
    """Schemas of `group` that have the key which the chosen one lacks."""
    return [name for name, schema in SCHEMAS.get(group, {}).items() if step.name in field_names(schema)]


def key_problem(composer: Composer, config: DictConfig, key: str, step: Step) -> Problem | None:
    """A key that does not exist in this configuration."""
    if step.hint is None:
        group = step.at
        elsewhere = owners(step, group)
        if elsewhere:
            fix = f"It belongs to {' or '.join(f'{group}={name}' for name in elsewhere)}"
        elif composer.is_group(key.replace(".", "/")):
            fix = f"{key} is a group; name it with a slash: {key.replace('.', '/')}=option"
        else:
            fix = did_you_mean(key, [*known_keys(Config, config), *SCHEMAS])
        place = f"{step.at} ({step.owner.__name__})" if step.at else "the configuration"
        return Problem(key, "there is no such key", f"{place} has none of this name", fix)
    for at, schema in step.unset.items():
        if schema not in MOUNTS:
            group = next((name for name, nodes in SCHEMAS.items() if schema in type_family(nodes)), at)
            return Problem(
                key,
                f"{at} is empty",
                "it has no kind yet, so no keys",
                f"Choose one first: +{group}@{at}={next(iter(SCHEMAS.get(group, {'option': None})))}",
            )
    return None


def type_family(nodes: dict[str, type]) -> set[type]:
    """The schemas of a group with their base classes."""
    return {base for node in nodes.values() for base in node.__mro__ if base is not object}


def value_problem(config: DictConfig, override: Override, step: Step) -> Problem | None:
    """Sets the value in `config`; a problem when it does not fit the type."""
    key, value = override.key_or_group, override.value()
    if override.is_delete():
        return Problem(key, "a key cannot be removed", "every key has a value", f"Set {key}=null where null is allowed")
    try:
        OmegaConf.update(config, key, value, merge=True, force_add=True)
    except AttributeError:
        # OmegaConf puts no dictionary where there is nothing yet.
        why = f"{key} is empty, and is filled key by key"
        return Problem(key, f"{override.get_value_element_as_str()} does not fit", why, f"Set {key}.KEY=VALUE")
    except (OmegaConfBaseException, TypeError) as error:
        allowed = describe(step.hint)
        reason = f"it takes {allowed}"
        if isinstance(value, dict):
            reason = str(error).splitlines()[0]
        return Problem(
            key, f"{override.get_value_element_as_str()} does not fit", reason, f"Set {key}={hint_of(step.hint)}"
        )
    return None


def hint_of(hint: Any) -> str:
    """A placeholder for the right-hand side of an override."""
    inner = strip_optional(hint)
    return {bool: "true", int: "N", float: "X", str: "TEXT"}.get(inner) or (
        "|".join(inner.__members__)
        if hasattr(inner, "__members__")
        else "[A,B]"
        if typing.get_origin(inner) is list
        else "..."
    )


def missing_problems(config: DictConfig) -> Iterator[Problem]:
    """One problem for each value that nothing gives."""
    for name in field_names(Config):
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys = [f"{name}.{inner}" for inner in sorted(OmegaConf.missing_keys(node))]
        else:
            keys = [name] if OmegaConf.is_missing(config, name) else []
        for key in keys:
            yield Problem(key, "it has no value", "nothing gives one", f"Set {key}=VALUE")


def build(config: DictConfig) -> tuple[Config | None, list[Problem]]:
    """The typed configuration, or what its dataclasses refuse, section by section."""
    problems: list[Problem] = []
    for name in Config.__dataclass_fields__:
        try:
            node = config._get_node(name)
            if isinstance(node, DictConfig) and not node._is_none():
                OmegaConf.to_object(node)
        except ConfigError as error:
            problems += error.problems
        except (ValueError, OpdError, OmegaConfBaseException) as error:
            problems.append(Problem(name, str(error).splitlines()[0], "its own checks refuse it", f"Change {name}.*"))
    if problems:
        return None, problems
    built = OmegaConf.to_object(config)
    assert isinstance(built, Config)
    return built, []


def mounts_for(steps: Iterable[Step]) -> list[str]:
    """Overrides that bring the schemas of `MOUNTS` into being where keys below them are set."""
    unset = {at: schema for step in steps if step.hint is not None for at, schema in step.unset.items()}
    chosen = {at: MOUNTS[schema].split("=") for at, schema in unset.items() if schema in MOUNTS}
    return [f"+{group}@{at}={option}" for at, (group, option) in chosen.items()]


def check(composer: Composer, overrides: Sequence[str]) -> Checked:
    """Looks at one command line without sweeps."""
    parsed, problems = parse_all(composer, overrides)
    chosen = [o for o in parsed if is_hydras(o) or composer.is_group(o.key_or_group)]
    valued = [o for o in parsed if o not in chosen]
    problems += repeated(chosen)
    bad = [(o, group_problem(composer, o)) for o in chosen if not is_hydras(o)]
    problems += [problem for _, problem in bad if problem is not None]
    usable = [o for o in chosen if (o, None) in bad or is_hydras(o)]
    texts = list(dict.fromkeys(without_nulls(composer, o) for o in usable))
    try:
        config = composer.compose(texts)
        steps = {o.key_or_group: walk(Config, config, o.key_or_group) for o in valued}
        mounts = mounts_for(steps.values())
        if mounts:
            config = composer.compose([*texts, *mounts])
    except ConfigError as error:
        return Checked(None, "", [], frozenset(), parsed, [*problems, *error.problems])
    added = frozenset(key for key, step in steps.items() if step.added)
    for override in valued:
        step = walk(Config, config, override.key_or_group)
        problem = key_problem(composer, config, override.key_or_group, step) or value_problem(config, override, step)
        problems += [problem] if problem else []
    problems += missing_problems(config)
    if problems:
        return Checked(None, "", mounts, added, parsed, problems)
    run_dir = str(OmegaConf.select(config, "hydra.run.dir"))
    with open_dict(config):
        del config["hydra"]
    built, refused = build(config)
    return Checked(built, run_dir, mounts, added, parsed, refused)
