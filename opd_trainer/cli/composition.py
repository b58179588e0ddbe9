"""Hydra's composition as a function, so that a configuration can be looked at before Hydra runs it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_trainer.cli.schema import register
from opd_trainer.errors import ConfigError, Problem

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


@dataclass(frozen=True, slots=True)
class Source:
    """Where options come from: conf/, its main file, and a folder of the user's own (`--config-dir`)."""

    directory: Path
    name: str = "config"
    extra: str | None = None


@dataclass(frozen=True, slots=True)
class Composer:
    """Composes configurations from one source, and remembers them: jobs of a sweep often differ in values only."""

    loader: ConfigLoader
    source: Source
    bases: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)

    @property
    def _repository(self) -> Any:
        # Not in Hydra's public interface; the pin hydra-core < 1.4 keeps it in place.
        return self.loader.repository  # pyright: ignore[reportAttributeAccessIssue]

    def is_group(self, name: str) -> bool:
        """Whether `name` is a config group."""
        return self._repository.group_exists(name)

    def options(self, group: str) -> list[str]:
        """The options of `group`."""
        return self._repository.get_group_options(group)

    def option_file(self, group: str, option: str) -> tuple[dict[str, Any], list[tuple[str, str | None, bool]]]:
        """What conf/<group>/<option>.yaml itself says: its keys, and its defaults as (path, option, is an override)."""
        result = self._repository.load_config(f"{group}/{option}")
        if result is None:
            return {}, []
        keys = OmegaConf.to_container(result.config, resolve=False)
        defaults = [
            (getattr(entry, "group", None) or entry.path, getattr(entry, "value", None), bool(entry.is_override()))
            for entry in (result.defaults_list or [])
        ]
        return {str(key): value for key, value in keys.items()} if isinstance(keys, dict) else {}, defaults

    def parse(self, override: str) -> Override:
        """One override.

        Raises:
            HydraException: it does not follow Hydra's grammar.
        """
        return OverridesParser.create(config_loader=self.loader).parse_override(override)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The configuration, with Hydra's own under `hydra`.

        Raises:
            ConfigError: Hydra or a YAML file has a problem.
        """
        key = tuple(overrides)
        if key not in self.bases:
            try:
                self.bases[key] = self.loader.load_configuration(
                    config_name=self.source.name, overrides=list(overrides), run_mode=RunMode.RUN, from_shell=False
                )
            except COMPOSITION_ERRORS as error:
                raise ConfigError([composition_problem(error)]) from error
        return copy.deepcopy(self.bases[key])


def composition_problem(error: Exception) -> Problem:
    """Hydra's complaint, in our form."""
    lines = [line.strip() for text in (str(error), str(error.__cause__ or "")) for line in text.splitlines()]
    fields = dict(line.split(": ", 1) for line in lines if line.startswith("full_key: "))
    key = fields.get("full_key", "configuration")
    said = [line.rstrip(".:") for line in lines if not line.startswith(("full_key", "object_type", "reference_type"))]
    what = "; ".join(dict.fromkeys(line for line in said if line))
    return Problem(key, what, "Hydra cannot compose it", "`python launch.py --info defaults` shows what is combined")


@contextmanager
def composer(source: Source) -> Iterator[Composer]:
    """A composer; Hydra's global state is as before afterwards."""
    register()
    with initialize_config_dir(str(source.directory), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        if source.extra:
            search_path = loader.get_search_path()
            search_path.prepend("command-line", f"file://{source.extra}", anchor="schema")
            loader = ConfigLoaderImpl(search_path)
        yield Composer(loader, source)
