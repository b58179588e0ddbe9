"""What command lines come to, without running anything."""

from collections.abc import Sequence
from pathlib import Path

from opd_trainer.cli.aliases import expand
from opd_trainer.cli.composition import Composer, composer
from opd_trainer.cli.plan import Plan, plan, read

CONF = Path(__file__).resolve().parents[1] / "conf"


def planned(shared: Composer, argv: Sequence[str]) -> Plan:
    """What the arguments of `launch.py` come to.

    Raises:
        ConfigError: they are refused.
    """
    expanded = expand(argv)
    command = read(expanded.argv, CONF)
    if command.source.extra is None:
        return plan(shared, command, expanded)
    with composer(command.source) as own:
        return plan(own, command, expanded)
