"""The end of a sweep: a table on the console and in files, and a page of curves."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from opd_trainer.files import write_atomically
from opd_trainer.sweep import plot, table
from opd_trainer.sweep.results import read_settings

TABLE, TABLE_CSV, TRIALS_CSV, CURVES = "table.md", "table.csv", "trials.csv", "curves.png"
WIDTH_OF_A_FILE = 400
"""Characters of a line where the output is no terminal: enough for any table."""


def summarize(directory: Path, console: Console | None = None) -> None:
    """Reads the trials in `directory`, prints their table and writes table.md, table.csv, trials.csv and curves.png.

    Raises:
        DataError: it holds no sweep.
    """
    settings = read_settings(directory)
    write_atomically(directory / TABLE, table.markdown(settings))
    write_atomically(directory / TABLE_CSV, table.settings_csv(settings))
    write_atomically(directory / TRIALS_CSV, table.trials_csv(settings))
    plot.save(plot.draw(settings, directory.absolute().name), directory / CURVES)
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    console.print()
    console.print(table.console_table(settings))
    for outcome in table.unfinished(settings):
        console.print(Text(table.remark(outcome)), soft_wrap=True)
    console.print(Text(f"sweep: {directory / TABLE}, {TABLE_CSV}, {TRIALS_CSV}, {CURVES}"), soft_wrap=True)
