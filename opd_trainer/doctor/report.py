"""The facts and the verdicts for people."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from opd_trainer.doctor.machine import Gpu, Machine
from opd_trainer.doctor.packages import Package
from opd_trainer.doctor.verdicts import Answer, Facts, Verdict

WIDTH = 120
STYLES = {Answer.yes: "green", Answer.partly: "yellow", Answer.no: "red"}


def gib(number: int) -> str:
    """Bytes for people."""
    return f"{number / 2**30:.1f} GiB"


def print_report(facts: Facts, found: Iterable[Verdict], console: Console | None = None) -> None:
    """Three tables: the machine, the packages, and what works."""
    if console is None:
        console = Console(highlight=False)
        console.width = max(console.width, WIDTH)
    console.print(_pairs("This machine", machine_rows(facts.machine)))
    console.print(_packages([*facts.packages.values()]))
    table = Table(title="What works here", title_justify="left", box=box.SIMPLE)
    for name in ("use", "works", "why", "what would help"):
        table.add_column(name, overflow="fold")
    for one in found:
        answer = f"[{STYLES[one.answer]}]{one.answer}[/]"
        table.add_row(_plain(one.use), answer, _plain(one.why), _plain(one.fix))
    console.print(table)


def machine_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    """What there is, line by line."""
    yield "system", machine.system
    yield "CPUs", str(machine.cpus)
    yield "memory", f"{gib(machine.memory_free)} free of {gib(machine.memory_total)}"
    for number, gpu in enumerate(machine.gpus):
        yield f"GPU {number}", gpu_line(gpu)
    if not machine.gpus:
        yield "GPUs", machine.cuda_complaint or "none"
    yield "torch's build", "for CPUs" if machine.cuda is None else f"for CUDA {machine.cuda}"
    for folder, free in machine.disks.items():
        yield f"disk of {folder}", f"{gib(free)} free"
    if machine.shared_memory is not None:
        yield "/dev/shm", f"{gib(machine.shared_memory)} free"
    yield "open files", f"at most {machine.open_files}"
    yield "host name", f"{machine.host_name}, {machine.host_address or 'which resolves to no address'}"
    yield "commands", ", ".join(name for name, path in machine.commands.items() if path) or "none"
    yield "C compiler", machine.compiler or "none"
    missing = [name for name, path in machine.commands.items() if path is None]
    if missing:
        yield "not found", ", ".join(missing)


def gpu_line(gpu: Gpu) -> str:
    """A GPU in a line."""
    free = "memory in use unknown" if gpu.free is None else f"{gib(gpu.free)} free"
    capability = ".".join(map(str, gpu.capability))
    return f"{gpu.name}, {free} of {gib(gpu.total)}, compute capability {capability}"


def _packages(packages: Iterable[Package]) -> Table:
    table = Table(title="Packages", title_justify="left", box=box.SIMPLE)
    for name in ("package", "version", "accepted", "imports"):
        table.add_column(name, overflow="fold")
    for package in packages:
        version = _plain(package.version or "-")
        imports = "-" if package.version is None else _plain(package.error or "yes")
        table.add_row(
            package.name, f"[yellow]{version}[/]" if package.other_version else version, package.accepted, imports
        )
    return table


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    for name, value in rows:
        table.add_row(_plain(name), _plain(value))
    return table


def _plain(text: str) -> str:
    """Text whose brackets mean nothing to rich."""
    return text.replace("[", r"\[")
