"""How responses are drawn, out of a configuration."""

import pytest

from opd_trainer.build.rollout import evaluation_sampling, sampling_of
from opd_trainer.build.vocabulary import Vocabulary, vocabulary_of
from opd_trainer.cli.check import check
from opd_trainer.cli.composition import Composer
from opd_trainer.config import Config
from opd_trainer.model.config import ModelConfig
from tests.runs.runs import save_model

SERVER = ("opd=sglang", "teacher=sglang_external", "teacher.url=http://host:1")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return vocabulary_of(ModelConfig(load=str(save_model(tmp_path_factory.mktemp("model"), 1))))


def config(compose: Composer, *overrides: str) -> Config:
    found = check(compose, overrides)
    assert found.config is not None, found.problems
    return found.config


def test_stop_tokens_are_the_models_and_those_that_are_asked_for(compose: Composer, vocabulary: Vocabulary) -> None:
    [end] = vocabulary.eos_token_ids
    asked = config(compose, f"rollout.stop_token_ids=[9,{end}]")
    assert sampling_of(asked, vocabulary).stop_token_ids == tuple(sorted((end, 9)))
    assert evaluation_sampling(asked, vocabulary).stop_token_ids == tuple(sorted((end, 9)))


@pytest.mark.parametrize(("overrides", "top_k"), [(SERVER, 4), ((), 0)])
def test_an_engine_is_asked_for_candidates_where_a_server_gives_the_teachers(
    compose: Composer, vocabulary: Vocabulary, overrides: tuple[str, ...], top_k: int
) -> None:
    asked = config(compose, *overrides, "opd.log_prob_top_k=4")
    assert sampling_of(asked, vocabulary).log_prob_top_k == top_k
    assert evaluation_sampling(asked, vocabulary).log_prob_top_k == 0


def test_an_evaluation_is_as_long_as_the_rollout_unless_asked(compose: Composer, vocabulary: Vocabulary) -> None:
    rollout = "rollout.max_response_tokens=20"
    lengths = [
        evaluation_sampling(config(compose, rollout, *more), vocabulary).max_response_tokens
        for more in ((), ("eval.max_response_tokens=30",))
    ]
    assert lengths == [20, 30]
