"""The plan for people."""

from rich.console import Console
from rich.table import Table

from opd_trainer.memory.capacity import Capacity
from opd_trainer.memory.fit import gib
from opd_trainer.memory.plan import Phase, Plan, Site

WIDTH = 120
"""Columns of the tables: one for each phase, and names that are not cut."""


def short(planned: Plan, capacity: Capacity) -> str:
    """One line for each kind of process, at its fullest phase."""
    lines = []
    for site in planned.sites:
        largest = sorted((i for i in site.items if site.fullest in i.phases), key=lambda i: -i.device)[:3]
        what = ", ".join(f"{item.name} {gib(item.device)}" for item in largest)
        room = "" if capacity.device is None else f" of {gib(capacity.device)}"
        lines.append(
            f"memory: {site.processes} x {site.name}: {gib(site.device(site.fullest))}{room} during {site.fullest} "
            f"({what})"
        )
    host = f"host {gib(planned.host(planned.fullest))}"
    room = "" if capacity.host is None else f" of {gib(capacity.host)}"
    lines[-1] += f"; {host}{room} in all"
    return "\n".join(lines)


def print_plan(planned: Plan, capacity: Capacity, console: Console | None = None) -> None:
    """A table for each kind of process."""
    if console is None:
        console = Console(highlight=False)
        console.width = max(console.width, WIDTH)
    for site in planned.sites:
        console.print(_table(site, gpu=planned.gpu))
    available = {
        "each GPU": capacity.device,
        "the host": capacity.host,
    }
    for name, number in available.items():
        if number is not None:
            console.print(f"{name}: {gib(number)} {capacity.source}", soft_wrap=True)
    console.print(
        f"the host needs {gib(planned.host(planned.fullest))} during {planned.fullest}"
        + ("" if planned.gpu else ", which is where the devices' memory is, too"),
        soft_wrap=True,
    )


def _table(site: Site, *, gpu: bool) -> Table:
    device = "device" if gpu else "CPU"
    table = Table(title=f"{site.processes} x {site.name}, each", title_justify="left", pad_edge=False)
    table.add_column("what", no_wrap=True)
    for phase in Phase:
        table.add_column(str(phase), justify="right", no_wrap=True)
    for item in site.items:
        for kind, number in ((device, item.device), ("host", item.host)):
            if number:
                name = item.name if kind == device else f"{item.name} (host)"
                table.add_row(name, *(gib(number) if phase in item.phases else "" for phase in Phase))
    table.add_section()
    table.add_row(f"{device}: all", *(gib(site.device(phase)) for phase in Phase), style="bold")
    if any(site.host(phase) for phase in Phase):
        table.add_row("host: all", *(gib(site.host(phase)) for phase in Phase), style="bold")
    return table
