import json
import os
from pathlib import Path
from typing import Any

import pytest

from opd_trainer.cli.resume import unfinished
from opd_trainer.run_record import config_hash, resume_hash


def leave(directory: Path, config: Any, status: str, age: int = 0) -> None:
    """What a run leaves behind."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "run.json"
    file.write_text(json.dumps({"config_hash": "", "resume_hash": resume_hash(config), "status": status}))
    os.utime(file, (1_000_000 - age, 1_000_000 - age))


def run_dir(check: Any, key: str = "hydra.run.dir") -> str | None:
    """Where Hydra is told to run."""
    found = [text.partition("=")[2] for text in check.overrides if text.startswith(f"{key}=")]
    return found[0].strip("'") if found else None


def test_hash_depends_on_what_is_computed_only(check: Any) -> None:
    hashes = []
    for arguments in (
        (),
        ("name=other", "resume=auto", "checkpoint.every=7", "tracking=wandb_offline", "output_dir=here"),
        ("seed=1",),
        ("estimator=rloo",),
        ("opd=off",),
        ("megatron.optimizer.lr=0.1",),
    ):
        assert check(*arguments), check.message
        hashes.append(config_hash(check.config))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == len(hashes) - 1


def test_a_run_may_go_on_elsewhere(check: Any, model_folder: str) -> None:
    def hashes(*arguments: str) -> tuple[str, str]:
        assert check(*arguments), check.message
        return config_hash(check.config), resume_hash(check.config)

    mine = hashes()
    for elsewhere in (
        ("cluster=ray", "cluster.num_workers=4", "megatron.tensor_parallel=2", "megatron.distributed_optimizer=true"),
        ("megatron.max_tokens_per_device=99", "megatron.recompute=full"),
        ("teacher=offload",),
        ("cluster=ray", "teacher=dedicated", "teacher.num_workers=2"),
    ):
        config, resume = hashes(*elsewhere)
        assert config != mine[0]
        assert resume == mine[1]
    for another in (
        ("megatron.optimizer.lr=0.1",),
        (f"teacher.load={model_folder}",),
        ("teacher.ckpt_step=3",),
        ("reference.kl_coef=0.1",),
        ("opd=sglang", "teacher=sglang_external", "teacher.url=http://host:1"),
    ):
        assert hashes(*another)[1] != mine[1], another


def test_a_new_run_gets_a_directory_of_its_own(launch: Any) -> None:
    assert launch() == 0
    first = launch.directory
    assert launch() == 0
    assert launch.directory != first
    assert first.parent == launch.directory.parent
    assert first.parent.parts[-2:] == ("outputs", "arithmetic")


def test_output_dir(launch: Any, tmp_path: Path) -> None:
    # Spaces, quotes and "=" mean something to Hydra.
    name = "a folder=of mine's"
    assert launch(f'output_dir="{name}"') == 0, launch.err
    assert launch.directory == tmp_path / name


def test_output_dir_that_is_taken(check: Any) -> None:
    assert check("output_dir=here"), check.message
    leave(Path("here"), check.config, "running")
    assert not check("output_dir=here")
    assert check.keys == ["output_dir"]
    assert "resume=auto" in check.message


@pytest.mark.parametrize(
    "argv", [("output_dir=file",), ("output_dir=file/run",), ("-m", "seed=1,2", "output_dir=file")]
)
def test_output_dir_that_cannot_be_made(check: Any, argv: tuple[str, ...]) -> None:
    Path("file").touch()
    assert not check(*argv)
    assert check.keys == ["output_dir"]
    assert "file is a file" in check.message
    assert check("output_dir=folder/not/there/yet"), check.message


@pytest.mark.parametrize("argv", [(), ("output_dir=run",), ("-m", "seed=1,2")])
def test_a_folder_where_nothing_can_be_written(
    check: Any, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not check(*argv)
    assert check.keys == ["output_dir"]
    assert f"nothing can be written into {Path.cwd()}" in check.message


@pytest.mark.parametrize("status", ["failed", "finished"])
def test_output_dir_of_a_run_that_ended_without_results(check: Any, status: str) -> None:
    assert check("output_dir=here"), check.message
    here = Path("here")
    leave(here, check.config, status)
    (here / "checkpoints").mkdir()
    # Cut when the run began.
    (here / "metrics.jsonl").write_text("")
    assert check("output_dir=here"), check.message
    assert check("output_dir=here", "seed=5"), check.message
    assert check("output_dir=here", "seed=5", "resume=auto"), check.message
    leave(here, check.config, "running")
    assert not check("output_dir=here"), "it may be at work on another machine"


@pytest.mark.parametrize(
    "result", ["metrics.jsonl", "summary.json", "eval_0000000.json", "checkpoints/iter_0000001/controller.json"]
)
def test_output_dir_with_results_is_taken(check: Any, result: str) -> None:
    assert check("output_dir=here"), check.message
    leave(Path("here"), check.config, "failed")
    (Path("here") / result).parent.mkdir(parents=True, exist_ok=True)
    (Path("here") / result).write_text('{"step": 0}\n')
    assert not check("output_dir=here")
    assert "resume=auto" in check.message
    assert check("output_dir=here", "resume=auto"), check.message
    assert not check("output_dir=here", "resume=auto", "seed=5")


def test_resume_in_a_named_directory(check: Any) -> None:
    assert check("output_dir=here", "resume=auto"), check.message
    config = check.config
    leave(Path("here"), config, "failed")
    (Path("here") / "metrics.jsonl").write_text('{"step": 0}\n')
    assert check("output_dir=here", "resume=auto"), check.message
    assert run_dir(check) == "here"
    assert not check("output_dir=here", "resume=auto", "seed=5")
    assert "settings differ" in check.message
    leave(Path("here"), config, "finished")
    assert not check("output_dir=here", "resume=auto")
    assert "nothing to continue" in check.message


def test_resume_finds_the_latest_unfinished_run_of_the_same_settings(check: Any) -> None:
    assert check("seed=9"), check.message
    other = check.config
    assert check("resume=auto"), check.message
    assert run_dir(check) is None
    config, runs = check.config, Path("outputs/arithmetic")
    leave(runs / "old", config, "running", age=100)
    leave(runs / "interrupted", config, "running", age=50)
    leave(runs / "done", config, "finished", age=10)
    leave(runs / "other", other, "running", age=5)
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    assert unfinished(runs, resume_hash(config)) == runs / "interrupted"
    assert check("resume=auto"), check.message
    assert run_dir(check) == str(runs / "interrupted")
    assert check(), check.message
    assert run_dir(check) is None


def test_a_resumed_run_is_in_its_old_directory(launch: Any, tmp_path: Path) -> None:
    assert launch() == 0
    config, directory = launch.runs[0]
    leave(directory, config, "running")
    assert launch("resume=auto") == 0
    assert launch.directory == directory
