"""What a run leaves behind, and what must hold of its numbers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from tests.runs.runs import ROOT, column, distil, launch, save_model, steps, summary, world

REFERENCES = "eval.reference_key=response"
KEYS = ("prompt", "response")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(small: Path) -> Path:
    output = small / "finished"
    assert launch(small, output, *distil(small), REFERENCES) == 0
    return output


def test_a_run_writes_every_file_that_the_documentation_names(finished: Path) -> None:
    written = {path.name for path in finished.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "summary.json", "samples.jsonl", "curves.png", "run.json"}
    assert files | {"checkpoints", "model"} <= written


def test_the_summary_has_everybody_who_was_evaluated(finished: Path) -> None:
    content = summary(finished)
    assert set(content["evaluation"]) == {"before", "after", "teacher"}
    assert all(set(scores) == {"heldout"} for scores in content["evaluation"].values())
    assert content["reverse_kl"]["first"] > 0
    assert content["steps"] == 3


def test_engine_and_trainer_agree_on_log_probs_at_every_version_of_the_weights(finished: Path) -> None:
    assert all(gap < 1e-4 for gap in column(finished, "train/rollout_log_prob_diff"))


def test_the_reverse_kl_of_a_step_is_that_of_its_samples(finished: Path) -> None:
    for line in steps(finished):
        gap = line["opd/student_log_prob"] - line["opd/teacher_log_prob"]
        assert math.isclose(line["opd/reverse_kl"], gap, rel_tol=1e-4)


def test_a_run_tells_its_speed_in_metrics_that_the_documentation_describes(finished: Path) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    described = [name.replace("<phase>", "[a-z]+") for name in re.findall(r"`(perf/[a-z_<>]+)`", page)]
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    told = {name for line in lines for name in line if name.startswith("perf/")}
    assert [name for name in told if not any(re.fullmatch(pattern, name) for pattern in described)] == []
    assert all(line["perf/update_tflops"] > 0 for line in lines)
    assert "perf/mfu" not in told, "nobody knows the peak of this device"


def test_the_exported_student_loads_in_transformers_and_has_moved(finished: Path, small: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(finished / "model").state_dict()
    initial = AutoModelForCausalLM.from_pretrained(small / "student").state_dict()
    assert trained.keys() == initial.keys()
    assert any(not torch.equal(trained[name], initial[name]) for name in initial)
    assert AutoTokenizer.from_pretrained(finished / "model").vocab_size > 0


def test_the_likelihood_of_reference_responses_is_that_of_transformers(finished: Path, small: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (small / "data" / "heldout.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(small / "student")
    found = summary(finished)["reference_nll"]
    for who, folder in (("before", small / "student"), ("after", finished / "model"), ("teacher", small / "teacher")):
        model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
        for row in rows:
            prompt, response = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in KEYS)
            tokens = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])
            with torch.no_grad():
                log_p = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
            losses.append(-log_p[len(prompt) - 1 :])
        assert found[who]["heldout"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4), who


def test_a_run_that_was_refused_leaves_its_directory_free(small: Path) -> None:
    output, empty = small / "refused", small / "empty.jsonl"
    empty.write_text("")
    assert launch(small, output, *distil(small), f"data.path={empty}") == 2
    assert (output / "run.json").is_file()
    assert launch(small, output, *distil(small), "steps=1") == 0
    assert launch(small, output, *distil(small), "steps=1") == 2


def test_the_same_seed_gives_the_same_numbers(small: Path, finished: Path) -> None:
    assert launch(small, small / "again", *distil(small), REFERENCES) == 0
    assert steps(small / "again") == steps(finished)


def test_a_teacher_that_is_the_student_has_a_reverse_kl_of_exactly_zero(small: Path) -> None:
    quiet = ("estimator=none", "megatron.optimizer.weight_decay=0")
    assert launch(small, small / "same", *distil(small, "student"), *quiet) == 0
    assert next(column(small / "same", "opd/reverse_kl")) == 0.0
    assert summary(small / "same")["reverse_kl"]["first"] == 0.0
    assert all(abs(kl) < 1e-6 for kl in column(small / "same", "opd/reverse_kl"))


def test_a_coefficient_of_zero_trains_exactly_as_without_distillation(small: Path) -> None:
    reward = ("reward=length", "reward.max_tokens=12", "reward.free_tokens=1")
    unasked = ("eval.teacher=false", "eval.reverse_kl_prompts=0")
    assert launch(small, small / "zero", *distil(small), "opd.kl_coef=0", *reward, *unasked) == 0
    assert launch(small, small / "off", "opd=off", *reward) == 0
    shared = ["train/loss", "train/grad_norm", "rollout/log_prob", "eval/heldout/pass@1"]
    for with_zero, without in zip(steps(small / "zero"), steps(small / "off"), strict=True):
        assert all(with_zero[name] == without[name] for name in shared if name in without)
    asked = summary(small / "zero")
    assert asked["evaluation"]["teacher"] == {}
    assert asked["reverse_kl"] == {"first": None, "last": None}


def test_a_family_that_is_not_mapped_is_refused_with_what_helps(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((save_model(tmp_path / "gemma", 3) / "config.json").read_text())
    (tmp_path / "gemma" / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    student = (f"model.load={tmp_path / 'gemma'}", "opd=off")
    for name, overrides in (("teacher", distil(tmp_path, "gemma")), ("student", student)):
        assert launch(small, tmp_path / name, *overrides) == 2
        message = capsys.readouterr().err
        assert "model_type is 'gemma2': Megatron models are built for llama, qwen2, qwen3, qwen3_moe" in message
        assert "opd=sglang" in message
        assert "docs/extending.md" in message
        assert "Traceback" not in message


def test_a_teacher_of_another_shape_needs_a_model_of_its_own(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opd_trainer.model.config import Family

    save_model(tmp_path / "llama", 3, Family.llama)
    other = distil(tmp_path, "llama")
    assert launch(small, tmp_path / "refused", *other) == 2
    message = capsys.readouterr().err
    assert "qk_norm" in message
    assert "opd=sglang" in message
    assert "Traceback" not in message
    assert launch(small, tmp_path / "accepted", *other, "+model@teacher.model=base", "steps=1") == 0
