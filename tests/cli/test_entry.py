"""Exit codes and what is printed, in this process and through launch.py."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.config import Config
from opd_trainer.errors import DataError, WorkerError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def fails_with(error: Exception, seed: int) -> Any:
    def fail(config: Config) -> None:
        if config.seed == seed:
            raise error

    return fail


def test_all_problems_are_printed(launch: Any) -> None:
    assert launch("opd.kl_ceof=1", "opd.type=xx") == 2
    assert launch.runs == []
    assert launch.err.splitlines()[0] == "The configuration has 2 problems:"
    assert "Traceback" not in launch.err


def test_success(launch: Any) -> None:
    assert launch() == 0
    assert len(launch.runs) == 1
    assert launch.err == ""


def test_a_user_error_of_the_run_is_plain_text(launch: Any) -> None:
    launch.fail = fails_with(DataError("row 7 is empty"), 0)
    assert launch() == 2
    assert launch.err == "row 7 is empty\n"


@pytest.mark.parametrize("error", [WorkerError("died"), RuntimeError("boom")])
def test_any_other_error_has_its_traceback(launch: Any, error: Exception) -> None:
    launch.fail = fails_with(error, 0)
    assert launch() == 1
    assert launch.err.startswith("Traceback")
    assert "in fail" in launch.err
    assert str(error) in launch.err


def test_a_sweep_goes_on_after_a_failure_and_reports_each(launch: Any) -> None:
    def fail(config: Config) -> None:
        if config.seed:
            raise DataError(f"bad file of seed {config.seed}")

    launch.fail = fail
    assert launch("-m", "seed=1,0,2") == 2
    assert [config.seed for config, _ in launch.runs] == [1, 0, 2]
    assert "bad file of seed 1" in launch.err
    assert "bad file of seed 2" in launch.err


def test_state_of_the_process_is_as_before(launch: Any) -> None:
    argv, environment = list(sys.argv), dict(os.environ)
    launch("opd=off")
    launch("opd.kl_ceof=1")
    assert sys.argv == argv
    assert dict(os.environ) == environment


def test_a_launcher_that_hydra_would_ignore(launch: Any) -> None:
    assert launch("hydra/launcher=submitit_local") == 2
    assert "add -m" in launch.err


def test_help_is_for_people(launch: Any) -> None:
    assert launch("--help") == 0
    assert "EXAMPLES" in launch.out
    assert "Powered by Hydra" not in launch.out


def test_cfg(launch: Any) -> None:
    assert launch("--cfg", "job", "opd_kl_coef=0.25") == 0
    assert "kl_coef: 0.25" in launch.out
    assert launch.runs == []
    assert launch("--cfg", "job", "opd.kl_ceof=0.25") == 2


def test_what_is_checked_is_what_runs(launch: Any, model_folder: str) -> None:
    arguments = [
        "eval.datasets.math.path=x.jsonl",
        f"teacher.model.huggingface={model_folder}",
        "experiment=arithmetic",
    ]
    more = ["data.chat_template_kwargs.a=1", "+teacher@teachers.math=resident", f"teachers.math.load={model_folder}"]
    assert launch(*arguments, *more) == 0, launch.err
    config = launch.runs[0][0]
    assert set(config.eval.datasets) == {"heldout", "math"}
    assert config.teacher.model.huggingface == model_folder
    assert config.teachers["math"].load == model_folder
    assert config.data.chat_template_kwargs == {"a": 1}


def test_without_the_demo(launch: Any, model_folder: str) -> None:
    arguments = ("experiment=null", f"model.load={model_folder}", "data.path=x", "opd=off")
    assert launch(*arguments) == 0, launch.err
    assert launch.runs[0][0].demo is None
    assert launch("-m", *arguments, "seed=1,2") == 0, launch.err
    assert len(launch.runs) == 2


def test_info(launch: Any) -> None:
    assert launch("--info", "defaults", "opd=off") == 0
    assert "opd/off" in launch.out


def run_launch(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *argv],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def seconds_of_children() -> float:
    """Of a processor, by processes that have ended; what else the machine does takes none of them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_launch_from_any_folder(tmp_path: Path) -> None:
    before = seconds_of_children()
    done = run_launch(tmp_path, "--cfg", "job", "opd_kl_coef=0.25")
    assert done.returncode == 0, done.stderr
    assert "kl_coef: 0.25" in done.stdout
    # A promise of 5 s on an idle machine.
    assert seconds_of_children() - before < 20


def test_launch_refuses_without_a_traceback(tmp_path: Path) -> None:
    done = run_launch(tmp_path, "opd=sglang", "teacher=sglang_external", "teacher.url=http://x", "teacher.load=y")
    assert done.returncode == 2
    assert "teacher.load: 'y' with opd=sglang" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_nothing_heavy_is_imported_to_say_no(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from opd_trainer.cli.entry import main\n"
        f"code = main(Path({str(ROOT / 'conf')!r}), ['opd=off', 'teacher.load=x'])\n"
        "heavy = {'megatron', 'ray', 'transformers', 'wandb', 'sglang', 'datasets'} & set(sys.modules)\n"
        "sys.exit(code if not heavy else str(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
