import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.layout import layout_problems, model_parallel_size, stage_layers


@pytest.mark.parametrize(
    ("settings", "world_size", "key", "fix"),
    [
        ({"tensor_parallel": 2, "context_parallel": 2}, 6, "megatron", "a multiple of 4"),
        ({"pipeline_parallel": 2, "expert_parallel": 4}, 4, "megatron.expert_parallel", "a divisor of 2"),
        ({"context_parallel": 3, "expert_parallel": 2}, 6, "megatron.expert_parallel", "a multiple of 3"),
        ({"sequence_parallel": True}, 1, "megatron.sequence_parallel", "megatron.sequence_parallel=false"),
        ({"pipeline_parallel": 2, "pipeline_layers": [4]}, 2, "megatron.pipeline_layers", "pipeline_layers=null"),
        ({"pipeline_parallel": 2, "pipeline_layers": [4, 0]}, 2, "megatron.pipeline_layers", "pipeline_layers=null"),
    ],
)
def test_impossible_layouts_are_named_with_a_fix(settings, world_size, key, fix):
    (problem,) = layout_problems(MegatronConfig(**settings), world_size)
    assert problem.key == key
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ({}, 3),
        ({"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2}, 8),
        ({"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 4}, 4),
        ({"pipeline_parallel": 2, "pipeline_layers": [1, 3], "expert_parallel": 2}, 8),
    ],
)
def test_possible_layouts_have_no_problems(settings, world_size):
    assert layout_problems(MegatronConfig(**settings), world_size) == []


def test_a_replica_takes_tensor_times_pipeline_times_context_ranks():
    layout = MegatronConfig(tensor_parallel=2, pipeline_parallel=3, context_parallel=5, expert_parallel=7)
    assert model_parallel_size(layout) == 30


@given(st.integers(1, 60), st.integers(1, 8))
def test_layers_are_spread_evenly_and_never_more_on_the_last_stage(num_layers, stages):
    layers = stage_layers(num_layers, MegatronConfig(pipeline_parallel=stages))
    assert len(layers) == stages
    assert sum(layers) == num_layers
    assert max(layers) - min(layers) <= 1
    assert layers[-1] == min(layers)


def test_the_layers_of_stages_are_those_asked_for_where_they_fit():
    asked = MegatronConfig(pipeline_parallel=2, pipeline_layers=[1, 3])
    assert stage_layers(4, asked) == (1, 3)
    assert stage_layers(6, asked) == (3, 3)
