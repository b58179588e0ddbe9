"""Runs the job that the command line describes: `python launch.py --help`."""

import sys
from pathlib import Path

from opd_trainer.cli.entry import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent / "conf"))
