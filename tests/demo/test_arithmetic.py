import json
import random

import pytest
from transformers import AutoTokenizer

from opd_trainer.demo.arithmetic import VOCABULARY, Problem, columns, draw_problems, save_tokenizer, write_dataset
from opd_trainer.demo.config import DemoConfig
from opd_trainer.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_problem_by_hand():
    problem = Problem((37, 58, -19))
    assert problem.prompt == "37+58-19="
    assert problem.label == "76"
    assert problem.response == "+785+359-596-917\n#### 76"


@pytest.mark.parametrize("num_operands", [2, 3, 4])
def test_problems_are_true_different_and_never_below_zero(num_operands):
    problems = draw_problems(500, num_operands, seed=1)
    assert len(set(problems)) == 500
    for problem in problems:
        # Python itself is the judge of the prompt's value.
        assert eval(problem.prompt[:-1]) == int(problem.label)
        assert all(10 <= number <= 99 for number in [*problem.totals, *map(abs, problem.terms)])
        working, answer = problem.response.split("\n")
        assert answer == f"#### {problem.label}"
        assert len(working) == 8 * (num_operands - 1)
        # The last two columns spell the answer, lowest digit first.
        assert working[-1] + working[-5] == problem.label


def test_columns_with_carry_and_borrow():
    assert columns(37, 58, 95) == "+785+359"
    assert columns(95, -19, 76) == "-596-917"


def test_draw_is_seeded_and_prefix_stable():
    assert draw_problems(300, 3, seed=5)[:100] == draw_problems(100, 3, seed=5)
    assert draw_problems(100, 3, seed=5) != draw_problems(100, 3, seed=6)


def test_more_problems_than_exist():
    with pytest.raises(DataError, match=r"demo\.num_train"):
        draw_problems(150, 1, seed=0)


def test_write_dataset_splits_are_disjoint_and_reproducible(tmp_path):
    config = DemoConfig(num_train=200, num_heldout=50, seed=3)
    write_dataset(tmp_path / "a", config)
    write_dataset(tmp_path / "b", config)
    write_dataset(tmp_path / "bigger", DemoConfig(num_train=400, num_heldout=50, seed=3))
    rows = {
        name: [json.loads(line) for line in (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    }
    assert (len(rows["train"]), len(rows["heldout"])) == (200, 50)
    prompts = [row["prompt"] for split in rows.values() for row in split]
    assert len(set(prompts)) == 250
    assert all(set(row) == {"prompt", "label", "response"} for row in rows["train"])
    assert all(row["response"].endswith(f"#### {row['label']}") for row in rows["train"])
    for name in rows:
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
    assert (tmp_path / "a/heldout.jsonl").read_bytes() == (tmp_path / "bigger/heldout.jsonl").read_bytes()


def test_tokenizer_round_trips_every_problem(tokenizer):
    for problem in draw_problems(200, 4, seed=2):
        text = problem.prompt + problem.response
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        # One id a character, but the answer mark is one.
        assert len(ids) == len(text) - 3


def test_tokenizer_round_trips_any_text_of_its_alphabet(tokenizer):
    generator = random.Random(0)
    for _ in range(100):
        text = "".join(generator.choices(VOCABULARY[3:], k=30))
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_special_tokens(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == len(VOCABULARY) == 20
    ids = tokenizer("1+1=")["input_ids"]
    assert tokenizer.decode([*ids, 1, 0], skip_special_tokens=True) == "1+1="
    assert tokenizer("x")["input_ids"] == [2]
