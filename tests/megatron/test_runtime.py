import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from opd_trainer.errors import ConfigError, OpdError
from opd_trainer.megatron.compat import cpu_compat, cpu_tensors, quiet
from opd_trainer.megatron.config import MegatronConfig
from opd_trainer.megatron.runtime import MegatronRuntime
from opd_trainer.model.config import Family
from tests.gloo import run_gloo
from tests.megatron import training
from tests.megatron.models import build, pack, sequences, started, tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is not there with a GPU")


GEMM = "te_general_gemm"
ROOT = Path(__file__).parents[2]


def patched_places():
    with quiet():
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils

    generators = random._get_cuda_rng_state, random._set_cuda_rng_state
    patched = torch.cuda.current_device, torch.cuda.synchronize, schedules.torch, *generators, hasattr(moe_utils, GEMM)
    return *patched, sys.excepthook


def test_twice_in_one_process_and_nothing_is_left(tmp_path):
    before = patched_places()
    outputs = []
    for run in range(2):
        (tmp_path / str(run)).mkdir()
        with started(tmp_path / str(run)) as runtime:
            assert torch.cuda.current_device is not before[0]
            assert (runtime.dp_size, runtime.dp_rank, runtime.tp_rank, runtime.pp_rank, runtime.cp_rank) == (
                1,
                0,
                0,
                0,
                0,
            )
            assert runtime.is_first_stage
            assert runtime.is_last_stage
            outputs.append(build(runtime, tiny(Family.qwen3), trainable=False).forward(pack(sequences())))
        assert patched_places() == before
        assert not distributed.is_initialized()
    assert torch.equal(*outputs)


def gloo_threads() -> int:
    return sum(path.read_text().startswith("gloo") for path in Path("/proc/self/task").glob("*/comm"))


def count_threads(rank: int, size: int, rendezvous: str, folder: Path) -> bytes:
    """gloo's threads during the life of a worker, after it, and after another one."""
    spec = training.spec(training.write_model(folder))
    with training.started(spec):
        during = gloo_threads()
    after = gloo_threads()
    with training.started(spec):
        pass
    return bytes([during, after, gloo_threads()])


def test_groups_end_with_the_worker_that_had_them(tmp_path):
    # In a process of its own, where nobody else has groups.
    ((during, after, after_another),) = run_gloo(count_threads, 1, tmp_path)
    assert after_another <= after < during / 2


FIRST_START = """
import sys, torch
from pathlib import Path
from tests.megatron.models import started
compile = torch.compile
with started(Path(sys.argv[1])):
    pass
assert torch.compile is compile
print(*sorted({"megatron.core", "torch._inductor.compile_fx", "wandb"} & set(sys.modules)))
import wandb

print(wandb.__name__)
"""


def test_a_start_loads_neither_a_compiler_nor_wandb(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_START, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["megatron.core", "wandb"], done.stderr


def test_nothing_is_left_when_starting_fails(tmp_path, monkeypatch):
    from megatron.core import parallel_state

    before = patched_places()

    def fail(**_settings):
        raise RuntimeError("no groups today")

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", fail)
    with pytest.raises(RuntimeError, match="no groups today"), started(tmp_path):
        pass
    assert patched_places() == before
    assert not distributed.is_initialized()


def test_one_at_a_time(tmp_path):
    with started(tmp_path) as runtime:
        with pytest.raises(OpdError, match="already has"):
            runtime.start()
        other = MegatronRuntime(0, 1, (tmp_path / "other").as_uri(), MegatronConfig(), 0)
        with pytest.raises(OpdError, match="already has"):
            other.start()
        other.close()
        assert distributed.is_initialized()


def test_close_twice(tmp_path):
    with started(tmp_path) as runtime:
        runtime.close()
    assert not distributed.is_initialized()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MegatronConfig(tensor_parallel=2), "does not divide 1 workers.*multiple of 2"),
        (MegatronConfig(expert_parallel=2), "does not divide the 1 workers of a pipeline stage"),
    ],
)
def test_impossible_layouts_are_refused_before_anything_starts(settings, message):
    with pytest.raises(ConfigError, match=message):
        MegatronRuntime(0, 1, "file:///nowhere", settings, 0)


def ranks(rank, world_size, rendezvous):
    runtime = MegatronRuntime(rank, world_size, rendezvous, MegatronConfig(tensor_parallel=2, timeout_s=300), 0)
    runtime.start()
    total = torch.tensor([float(rank)])
    distributed.all_reduce(total, group=runtime.dp_group)
    result = (runtime.tp_rank, runtime.tp_size, runtime.dp_rank, runtime.dp_size, total.item())
    runtime.close()
    return result


def test_ranks_of_four_processes():
    assert run_gloo(ranks, 4) == [(0, 2, 0, 2, 2.0), (1, 2, 0, 2, 4.0), (0, 2, 1, 2, 2.0), (1, 2, 1, 2, 4.0)]


def test_cpu_tensors_stand_in_for_cuda_tensors():
    tensor = torch.ones(3)
    with cpu_tensors():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.empty(2, device=torch.device("cuda", 0)).device.type == "cpu"
        assert tensor.cuda() is tensor
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.type(torch.float64).dtype == torch.float64
    assert tensor.type() == "torch.FloatTensor"


def test_schedules_see_zeros_on_the_processor():
    from megatron.core.pipeline_parallel import schedules

    with cpu_compat():
        assert schedules.torch.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
        assert schedules.torch.is_tensor is torch.is_tensor
