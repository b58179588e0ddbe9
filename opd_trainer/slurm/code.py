"""The code of a job, copied when it is submitted: what waits in a queue must not change with the working tree."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import opd_trainer
from opd_trainer.tracking.provenance import FROZEN_GIT, git_state

PACKAGE = Path(opd_trainer.__file__).parent
DIFF_FILE = "git.diff"


def freeze_code(folder: Path) -> Path:
    """A copy of this package below `folder`, with the state of git beside it; a folder to put on PYTHONPATH.

    Its name comes from its content, so that jobs still in the queue keep theirs when another command submits to the
    same folder.
    """
    files = sorted(file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(PACKAGE)}\0".encode())
        digest.update(file.read_bytes())
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for file in files:
        copy = partial / PACKAGE.name / file.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    state = git_state()
    (partial / FROZEN_GIT).write_text(json.dumps(state) + "\n", encoding="utf-8")
    if state is not None and state["dirty"]:
        diff = subprocess.run(["git", "-C", str(PACKAGE), "diff", "HEAD"], capture_output=True, check=True, timeout=60)
        (partial / DIFF_FILE).write_bytes(diff.stdout)
    partial.rename(target)
    return target


def code_lines(code: Path) -> list[str]:
    """Lines of shell after which Python imports this package from `code`."""
    # Without the second line `python -m` would look into the working directory first.
    return [f'export PYTHONPATH="{code}${{PYTHONPATH:+:$PYTHONPATH}}"', "export PYTHONSAFEPATH=1"]
