"""How the demo's models are made."""

from pathlib import Path

import pytest

from opd_trainer.cluster.config import InProcessCluster
from opd_trainer.config import Config
from opd_trainer.data.config import DataConfig
from opd_trainer.demo.config import DemoConfig
from opd_trainer.demo.prepare import prepared, supervised
from opd_trainer.estimator.grpo import Grpo
from opd_trainer.eval.config import EvalConfig
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.model.config import ModelConfig
from opd_trainer.reward.config import ExactReward
from opd_trainer.rollout.config import EmbeddedRollout, SglangRollout
from opd_trainer.task.config import ServeTask, ServeTeacherTask, TaskConfig, TrainTask
from opd_trainer.teacher.config import SglangManagedTeacher
from opd_trainer.tracking.config import TrackingConfig


def config(task: TaskConfig, cache: Path, load: str = "demo:teacher") -> Config:
    return Config(
        task=task,
        estimator=Grpo(),
        teacher=SglangManagedTeacher(load=load),
        model=ModelConfig(load=load),
        megatron=MegatronConfig(),
        data=DataConfig(path="demo:train"),
        reward=ExactReward(),
        rollout=SglangRollout(max_response_tokens=48, stop_token_ids=[7]),
        cluster=InProcessCluster(),
        eval=EvalConfig(),
        tracking=TrackingConfig(),
        demo=DemoConfig(cache=str(cache)),
    )


def test_a_model_from_scratch_is_not_served(tmp_path: Path) -> None:
    """There is nothing for an SGLang server to load; the engine in this process grades it."""
    run = config(TrainTask(), tmp_path)
    assert run.demo is not None
    made = supervised(run, run.demo, tmp_path).rollout
    assert isinstance(made, EmbeddedRollout)
    assert (made.max_response_tokens, made.stop_token_ids) == (48, [7])


@pytest.mark.parametrize("task", [ServeTeacherTask(), ServeTask()])
def test_serving_another_model_does_not_build_the_demo(tmp_path: Path, task: TaskConfig) -> None:
    def train(config: Config, folder: Path) -> float:
        raise AssertionError("built")

    asked = config(task, tmp_path, load="some/folder")
    assert prepared(asked, train) is asked
    with pytest.raises(AssertionError, match="built"):
        prepared(config(task, tmp_path), train)


def test_it_says_whose_training_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(config: Config, folder: Path) -> float:
        for name in ("checkpoints", "model", "snapshot"):
            (folder / name).mkdir(parents=True)
        print("training")
        return 1.0

    run = config(TrainTask(), tmp_path)
    prepared(run, train)
    first, training, last = capsys.readouterr().out.splitlines()
    assert "the teacher's training" in first
    assert training == "training"
    assert last.endswith("is made; now the run itself")
    prepared(run, train)
    assert capsys.readouterr().out == ""
