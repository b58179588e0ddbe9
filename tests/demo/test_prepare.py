"""How the demo's models are made."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from opd_trainer.cluster.config import InProcessCluster
from opd_trainer.config import Config
from opd_trainer.data.config import DataConfig
from opd_trainer.demo.config import DemoConfig
from opd_trainer.demo.prepare import prepared, supervised, with_real_paths
from opd_trainer.errors import UserError
from opd_trainer.estimator.grpo import Grpo
from opd_trainer.eval.config import EvalConfig
from opd_trainer.loss.config import ReferenceConfig
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.model.config import ModelConfig
from opd_trainer.reward.config import ExactReward, NoReward
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
        rollout=SglangRollout(),
        cluster=InProcessCluster(),
        eval=EvalConfig(),
        tracking=TrackingConfig(),
        demo=DemoConfig(cache=str(cache)),
    )


def test_what_all_runs_share_does_not_depend_on_the_run_that_builds_it(tmp_path: Path) -> None:
    """Nor is a model from scratch served: there is nothing for an SGLang server to load."""
    run = config(TrainTask(), tmp_path)
    assert run.demo is not None
    served = SglangRollout(temperature=0.5, max_response_tokens=4, stop_token_ids=[7])
    odd = dataclasses.replace(
        run, reward=NoReward(), rollout=served, reference=ReferenceConfig(kl_coef=0.1), eval=EvalConfig(n_prompts=1)
    )
    usual = dataclasses.replace(run, rollout=EmbeddedRollout(max_prompt_tokens=16, max_response_tokens=48))
    made = [supervised(one, run.demo, tmp_path) for one in (odd, usual)]
    assert dataclasses.replace(made[0], reference=made[1].reference) == made[1]
    assert (made[0].reward, made[0].rollout) == (usual.reward, usual.rollout)
    # What the demo's own settings ask for is what the recipe asks for.
    written = OmegaConf.load(Path(__file__).parents[2] / "conf" / "experiment" / "arithmetic.yaml").rollout
    assert (written.max_prompt_tokens, written.max_response_tokens) == (16, 48)


@pytest.mark.parametrize("task", [ServeTeacherTask(), ServeTask()])
def test_serving_another_model_does_not_build_the_demo(tmp_path: Path, task: TaskConfig) -> None:
    def train(config: Config, folder: Path) -> float:
        raise AssertionError("built")

    asked = config(task, tmp_path, load="some/folder")
    assert prepared(asked, train) is asked
    with pytest.raises(AssertionError, match="built"):
        prepared(config(task, tmp_path), train)


def test_a_teacher_that_does_not_get_there_is_for_the_user_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reached 0\.5 instead of 0\.99 .*: raise demo\.max_steps"):
        prepared(config(TrainTask(), tmp_path), lambda config, folder: 0.5)


def test_only_paths_of_the_demo_are_replaced(tmp_path: Path) -> None:
    named = dataclasses.replace(config(TrainTask(), tmp_path), name="demo:mine")
    replaced = with_real_paths(named, tmp_path)
    assert (replaced.name, replaced.model.load) == ("demo:mine", str(tmp_path / "teacher"))
    assert replaced.data.path == str(tmp_path / "data" / "train.jsonl")


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
