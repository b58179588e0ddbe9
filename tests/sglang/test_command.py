"""The command line of an SGLang server says what the settings say, with a GPU and without."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_trainer.sglang.command import CPU_FLAGS, Purpose, server_command, server_environment
from opd_trainer.sglang.config import LaunchConfig
from opd_trainer.sglang.fleet import Fleet


def command(*, gpu: bool = True, purpose: Purpose | None = None, **settings: Any) -> list[str]:
    return server_command("DIR", 1234, LaunchConfig(**settings), purpose or Purpose(), gpu=gpu)


def value(of: list[str], flag: str) -> str:
    """Of a flag; the last one wins."""
    return next(after for name, after in reversed(list(itertools.pairwise(of))) if name == flag)


def test_settings_become_flags() -> None:
    found = command(
        python="/env/bin/python",
        host="0.0.0.0",
        dtype="bfloat16",
        tensor_parallel=2,
        memory_fraction=0.8,
        max_total_tokens=5000,
        args=["--context-length", "99"],
    )
    assert found == [
        *("/env/bin/python", "-m", "sglang.launch_server", "--model-path", "DIR"),
        *("--host", "0.0.0.0", "--port", "1234", "--dtype", "bfloat16", "--skip-tokenizer-init", "--tp-size", "2"),
        *("--enable-deterministic-inference", "--max-total-tokens", "5000", "--mem-fraction-static", "0.8"),
        *("--context-length", "99"),
    ]


def test_what_is_not_set_is_left_to_sglang() -> None:
    found = command(module="mine", deterministic=False)
    assert found[:3] == [sys.executable, "-m", "mine"]
    assert value(found, "--dtype") == "auto"
    assert not {"--enable-deterministic-inference", "--max-total-tokens", "--mem-fraction-static"} & set(found)


def test_without_a_gpu() -> None:
    found = command(gpu=False)
    assert set(CPU_FLAGS) <= set(found)
    assert "--enable-deterministic-inference" not in found
    assert value(found, "--max-total-tokens") == "20000"
    asked = command(gpu=False, max_total_tokens=77, memory_fraction=0.5)
    assert (value(asked, "--max-total-tokens"), value(asked, "--mem-fraction-static")) == ("77", "0.5")


def test_purposes() -> None:
    assert "--skip-tokenizer-init" not in command(purpose=Purpose(text=True))
    sleeps = Purpose(releases_memory=True)
    assert "--enable-memory-saver" in command(purpose=sleeps)
    assert "--enable-memory-saver" not in command(gpu=False, purpose=sleeps)
    assert value(command(purpose=Purpose(weights=False)), "--load-format") == "dummy"


@pytest.mark.parametrize(
    ("devices", "gpu", "expected"),
    [
        ([2, 3], True, {"CUDA_VISIBLE_DEVICES": "2,3"}),
        ([], True, {}),
        ([2], False, {"SGLANG_USE_CPU_ENGINE": "1"}),
    ],
)
def test_the_environment(devices: list[int], gpu: bool, expected: dict[str, str]) -> None:
    assert server_environment(devices, gpu=gpu) == expected


def test_servers_share_out_ports_and_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = LaunchConfig(servers=2, tensor_parallel=2, devices=[4, 5, 6, 7], port=9000, start_timeout_s=5.0)
    fleet = Fleet.launch("teacher", "DIR", config, tmp_path)
    assert fleet.urls == ("http://127.0.0.1:9000", "http://127.0.0.1:9001")
    specs = [fleet.servers[url].spec for url in fleet.urls]
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["4,5", "6,7"]
    assert [value(list(spec.command), "--port") for spec in specs] == ["9000", "9001"]
    assert [spec.log for spec in specs] == [tmp_path / "teacher-0.log", tmp_path / "teacher-1.log"]
    assert {spec.start_timeout_s for spec in specs} == {5.0}
