"""conf/ against the dataclasses: same groups, nothing said twice, everything documented."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from opd_trainer.cli.check import check
from opd_trainer.cli.composition import Composer
from opd_trainer.cli.reference import field_docs, render
from opd_trainer.cli.schema import SCHEMAS
from opd_trainer.cli.schema_walk import field_names
from opd_trainer.config import Config

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
MODIFIERS = {"experiment", "debug"}
"""Groups without a package: they change the others."""
OPTIONS = sorted(file for file in CONF.glob("*/*.yaml") if file.parent.name not in {*MODIFIERS, "hydra"})
WHOLE_RUNS = sorted(file for group in MODIFIERS for file in (CONF / group).glob("*.yaml"))


def name_of(file: Path) -> str:
    return f"{file.parent.name}={file.stem}"


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


def written(file: Path) -> dict[str, Any]:
    """The keys that a file sets itself."""
    content = yaml.safe_load(file.read_text())
    return {key: value for key, value in leaves({k: v for k, v in content.items() if k != "defaults"}) if key}


def schema_of(file: Path) -> type:
    first = yaml.safe_load(file.read_text())["defaults"][0]
    _, schema, group, name = first.removesuffix("@_here_").split("/")
    assert (schema, group) == ("schema", file.parent.name)
    return SCHEMAS[group][name]


def test_groups_are_packages() -> None:
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - MODIFIERS - {"hydra"}
    assert groups == set(SCHEMAS) - {"demo"}
    for group in groups:
        assert (ROOT / "opd_trainer" / group / "__init__.py").is_file()


def test_every_group_is_in_the_table_of_contents() -> None:
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    listed = {key for entry in entries if isinstance(entry, dict) for key in entry if not key.startswith("override")}
    assert listed == {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"hydra"}


def test_every_schema_has_an_option() -> None:
    used = {schema_of(file) for file in OPTIONS}
    registered = {schema for group, schemas in SCHEMAS.items() if group != "demo" for schema in schemas.values()}
    assert used == registered


@pytest.mark.parametrize("file", OPTIONS, ids=name_of)
def test_an_option_repeats_no_default(file: Path) -> None:
    defaults = OmegaConf.structured(schema_of(file))
    for key, value in written(file).items():
        default = OmegaConf.select(defaults, key)
        assert OmegaConf.to_yaml({"value": default}) != OmegaConf.to_yaml({"value": value}), (
            f"{key} repeats its default"
        )


@pytest.mark.parametrize("file", WHOLE_RUNS, ids=name_of)
def test_an_experiment_repeats_no_default(file: Path, compose: Composer) -> None:
    defaults = yaml.safe_load(file.read_text()).get("defaults", [])
    choices = [
        f"{k.removeprefix('override /')}={v}".replace("/", "+", 1 if k.startswith("/") else 0)
        for entry in defaults
        if isinstance(entry, dict)
        for k, v in entry.items()
    ]
    without = compose.compose(["~experiment", *choices])
    for key, value in written(file).items():
        assert OmegaConf.select(without, key) != value, f"{key} repeats its default"


@pytest.mark.parametrize("file", OPTIONS, ids=name_of)
def test_an_option_is_short_and_says_what_it_is(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 15


@pytest.mark.parametrize("file", [*OPTIONS, *WHOLE_RUNS], ids=name_of)
def test_every_option_composes(file: Path, compose: Composer) -> None:
    found = check(compose, [name_of(file)])
    assert found.problems == []
    assert isinstance(found.config, Config)


def test_no_hydra_machinery_in_the_options() -> None:
    for file in [*OPTIONS, *WHOLE_RUNS]:
        assert "_target_" not in file.read_text(), file


@pytest.mark.parametrize("schema", [Config, *(s for schemas in SCHEMAS.values() for s in schemas.values())])
def test_every_field_is_documented(schema: type) -> None:
    pending = [schema]
    while pending:
        current = pending.pop()
        assert set(field_names(current)) == set(field_docs(current)) & set(field_names(current)), current
        pending += [
            type(entry.default_factory())
            for entry in dataclasses.fields(current)
            if entry.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(entry.default_factory())
        ]


def test_the_reference_is_up_to_date() -> None:
    assert (CONF / "README.md").read_text() == render(CONF), "run python -m opd_trainer.cli.reference"


def test_the_help_names_every_option() -> None:
    text = yaml.safe_load((CONF / "hydra" / "help" / "opd_trainer.yaml").read_text())["template"]
    words = set(text.split())
    for file in [*OPTIONS, *WHOLE_RUNS]:
        assert {file.parent.name, file.stem} <= words, name_of(file)
