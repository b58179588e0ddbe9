"""The recipes for real models: composed, and preflighted for the GPUs that they ask for, without a weight."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from opd_trainer.cli.entry import main
from opd_trainer.cluster.config import RayCluster
from opd_trainer.megatron.families.registry import architecture_from_config, to_hf_config
from opd_trainer.model.config import ArchitectureConfig, Family

ROOT = Path(__file__).parents[1]
VOCABULARY = 151936
"""Rows of Qwen3's embedding."""
QWEN3_8B = ArchitectureConfig(
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    rope_theta=1000000,
    max_length=40960,
    tie_embeddings=False,
)
QWEN3_4B = ArchitectureConfig(
    hidden_size=2560,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=9728,
    rope_theta=1000000,
    max_length=40960,
)
PARAMETERS = {
    "qwen3_8b_from_32b": 8.19e9,
    "qwen3_8b_same_shape": 8.19e9,
    "qwen3_4b_from_8b": 4.02e9,
    "qwen3_1_7b_one_gpu": 1.72e9,
    "qwen3_30b_a3b_self": 30.5e9,
}
"""Of the student, as its model card says."""
RECIPES = [ROOT / "conf" / "experiment" / f"{name}.yaml" for name in PARAMETERS]
H100_GIB, H200_GIB = 79, 140
"""What the driver reports, rounded down."""
MEMORY_GIB = dict.fromkeys(PARAMETERS, H100_GIB) | {"qwen3_30b_a3b_self": H200_GIB}


def recipe(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def shape_of(name: str) -> ArchitectureConfig:
    """The student's architecture, as the recipe gives it."""
    written = recipe(ROOT / "conf" / "experiment" / f"{name}.yaml")["model"]["architecture"]
    built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ArchitectureConfig), written))
    assert isinstance(built, ArchitectureConfig)
    return built


def describe(folder: Path, shape: ArchitectureConfig, tokenizer: PreTrainedTokenizerFast) -> Path:
    """What one has of a model before its weights are downloaded."""
    tokenizer.save_pretrained(folder)
    config = to_hf_config(architecture_from_config(shape, len(tokenizer)))
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    return folder


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer of Qwen3's size, the teachers' shapes and a few problems; no weights."""
    folder = tmp_path_factory.mktemp("shelf")
    words = {"<pad>": 0, "<|im_end|>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} <|im_end|>{% endfor %}"
    teachers = {"qwen3_8b_same_shape": QWEN3_8B, "qwen3_1_7b_one_gpu": QWEN3_4B}
    for name in PARAMETERS:
        describe(folder / name / "student", shape_of(name), tokenizer)
        describe(folder / name / "teacher", teachers.get(name, shape_of(name)), tokenizer)
    problem = {"prompt": [{"role": "user", "content": "w3 w4 w5"}], "label": "7"}
    (folder / "dapo.jsonl").write_text(json.dumps(problem) + "\n")
    (folder / "math_500.jsonl").write_text(json.dumps({"problem": "w3", "answer": "7"}) + "\n")
    return folder


def preflight(shelf: Path, name: str, output: Path, memory_gib: int) -> int:
    return main(
        ROOT / "conf",
        [
            "task=preflight",
            f"task.device_memory_gib={memory_gib}",
            f"experiment={name}",
            f"model.huggingface={shelf / name / 'student'}",
            f"teacher.load={shelf / name / 'teacher'}",
            f"data.path={shelf / 'dapo.jsonl'}",
            f"eval.datasets.math_500.path={shelf / 'math_500.jsonl'}",
            f"output_dir={output}",
        ],
    )


def test_every_recipe_of_qwen3_is_known_here() -> None:
    assert {file.stem for file in (ROOT / "conf" / "experiment").glob("qwen3*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_preflight_for_the_gpus_that_a_recipe_asks_for(
    shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    code = preflight(shelf, name, tmp_path / "run", MEMORY_GIB[name])
    printed = capsys.readouterr()
    assert code == 0, printed.err + printed.out
    assert "ready: prompts 1 of train" in printed.out


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_models(name: str) -> None:
    shape = shape_of(name)
    attention = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * shape.hidden_size
    feed_forward = 3 * shape.hidden_size * shape.intermediate_size
    if shape.family is Family.qwen3_moe:
        feed_forward = shape.experts.count * 3 * shape.hidden_size * shape.experts.intermediate_size
    embeddings = VOCABULARY * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    total = shape.num_layers * (attention + feed_forward) + embeddings
    assert total == pytest.approx(PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_only_the_user_knows_is_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ROOT / "conf", [f"experiment={name}"]) == 2
    asked = capsys.readouterr().err
    for key in ("teacher.load", "data.path", "eval.datasets.math_500.path", "model.load"):
        assert f". {key}: null" in asked


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_says_what_it_wants_and_what_was_run(file: Path) -> None:
    comments = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    for word in ("You give", "Hardware:", "Memory:", "Run so far:"):
        assert word in comments


def test_a_gpu_that_is_too_small_is_refused(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight(shelf, "qwen3_1_7b_one_gpu", tmp_path / "run", 24) == 2
    assert "GiB" in capsys.readouterr().err


def devices(of: Mapping[str, Any]) -> set[int]:
    return set(of.get("launch", {}).get("devices", []))


ONE_NODE = [name for name in PARAMETERS if name not in ("qwen3_30b_a3b_self", "qwen3_1_7b_one_gpu")]
"""On several nodes the planner keeps the GPUs of servers from the workers; in one process there are no servers."""


@pytest.mark.parametrize("name", ONE_NODE)
def test_no_gpu_is_given_to_two(name: str) -> None:
    found = recipe(ROOT / "conf" / "experiment" / f"{name}.yaml")
    training = set(range(found.get("cluster", {}).get("num_workers", RayCluster().num_workers)))
    rollout, teacher = devices(found["rollout"]), devices(found.get("teacher", {}))
    assert rollout
    assert not training & (rollout | teacher)
    assert not rollout & teacher
