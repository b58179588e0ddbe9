"""`task=doctor`: what is installed, what the machine has, and what of this project works here."""

import dataclasses
import json
import sys
from pathlib import Path

from opd_trainer.build.roster import teachers_of
from opd_trainer.config import Config
from opd_trainer.demo.config import DemoConfig
from opd_trainer.doctor.machine import examine
from opd_trainer.doctor.packages import NEEDED, OPTIONAL, SGLANG, accepted_versions, look_for, probe
from opd_trainer.doctor.report import print_report
from opd_trainer.doctor.verdicts import Facts, verdicts
from opd_trainer.doctor.wandb_key import wandb_key
from opd_trainer.files import write_atomically
from opd_trainer.rollout.config import SglangRollout
from opd_trainer.task.config import DoctorTask
from opd_trainer.teacher.config import SglangManagedTeacher
from opd_trainer.tracking.provenance import git_state, package_versions

REPORT = "doctor.json"


async def doctor(config: Config, output_dir: Path) -> None:
    """Prints the report, and writes it to `output_dir`/doctor.json; needs no model, and starts no server."""
    assert isinstance(config.task, DoctorTask)
    print("doctor: importing every package once, which takes a while", flush=True)
    accepted = accepted_versions()
    facts = Facts(
        machine=examine([output_dir.parent, Path((config.demo or DemoConfig()).cache)]),
        packages=await look_for([*NEEDED, *OPTIONAL], accepted),
        servers={python: await probe(SGLANG, accepted, python) for python in server_pythons(config)},
        wandb_key=wandb_key(),
    )
    found = verdicts(facts)
    print_report(facts, found)
    written = {
        "git": git_state(),
        "versions": package_versions(),
        "facts": dataclasses.asdict(facts),
        "verdicts": [dataclasses.asdict(one) for one in found],
    }
    write_atomically(output_dir / REPORT, json.dumps(written, indent=2) + "\n")
    print(f"{output_dir / REPORT}: the same, to go with a report of a defect")


def server_pythons(config: Config) -> list[str]:
    """The Pythons that SGLang servers would run with."""
    launches = [teacher.launch for teacher in teachers_of(config).values() if isinstance(teacher, SglangManagedTeacher)]
    if isinstance(config.rollout, SglangRollout):
        launches.append(config.rollout.launch)
    return list(dict.fromkeys(launch.python or sys.executable for launch in launches)) or [sys.executable]
