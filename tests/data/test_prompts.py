import json

import datasets
import pytest

from opd_trainer.build.data import SKIPPED_ROWS, Prompts
from opd_trainer.data.config import DataConfig, MixtureData, OnBadRow
from opd_trainer.data.prompts import check_disjoint, check_teachers, load_prompts, load_training_sets
from opd_trainer.errors import DataError


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(rows, *, max_prompt_tokens=1000, name="train", **settings):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        config = DataConfig(path=str(path), **settings)
        return load_prompts(config, tokenizer, name=name, max_prompt_tokens=max_prompt_tokens)

    return load


def test_text_prompt_gets_the_tokenizers_own_special_tokens(load, tokenizer):
    (prompt,) = load([{"prompt": "1+1=", "label": 2, "level": "easy"}]).prompts
    assert prompt.text == "1+1="
    assert prompt.tokens.tolist() == [2, *(tokenizer.convert_tokens_to_ids(list("1+1=")))]
    assert (prompt.answer, prompt.dataset, prompt.teacher) == ("2", "train", "default")
    assert prompt.metadata == {"level": "easy"}


def test_messages_use_the_chat_template_and_no_second_bos(load, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    (prompt,) = load([{"prompt": messages, "label": "x"}]).prompts
    assert prompt.text == "[user]hi[assistant]"
    assert prompt.tokens.tolist() == tokenizer.convert_tokens_to_ids(list(prompt.text))


def test_template_system_prompt_and_template_arguments(load):
    settings = {
        "prompt_template": "Q: {prompt} {x}",
        "system_prompt": "Be brief.",
        "apply_chat_template": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "yo"}]
    loaded = load([{"prompt": "hi", "label": "x"}, {"prompt": own, "label": "x"}], **settings)
    assert [prompt.text for prompt in loaded.prompts] == [
        "[system]Be brief.[user]Q: hi {x}[assistant][no thinking]",
        "[system]Mine.[user]yo[assistant][no thinking]",
    ]


def test_keys_dotted_and_alternative(load):
    rows = [
        {"problem": "a", "reward_model": {"ground_truth": "1"}, "extra": {"index": 7}, "who": "math"},
        {"prompt": "b", "answer": 2.5, "extra": {"index": 8}, "who": "code"},
    ]
    loaded = load(
        rows,
        prompt_key="problem|prompt",
        label_key="answer|reward_model.ground_truth",
        metadata_key="extra",
        teacher_key="who",
    )
    assert [(p.text, p.answer, p.teacher, p.metadata["index"]) for p in loaded.prompts] == [
        ("a", "1", "math", 7),
        ("b", "2.5", "code", 8),
    ]


def test_no_label_wanted(load):
    (prompt,) = load([{"prompt": "a"}], label_key=None).prompts
    assert prompt.answer is None


BAD_ROWS = {
    '{"prompt": ': "not JSON",
    '{"label": "1"}': "no column 'prompt'",
    '{"prompt": "a"}': "no column 'label'",
    '{"prompt": 5, "label": "1"}': "neither text nor a list",
    '{"prompt": " ", "label": "1"}': "empty",
    '{"prompt": [], "label": "1"}': "neither text nor a list",
    '{"prompt": [{"role": "user"}], "label": "1"}': "lacks a text",
    '{"prompt": [{"role": "assistant", "content": "b"}], "label": "1"}': "nothing left",
    '{"prompt": [{"role": "tool", "content": "a"}], "label": "1"}': "chat template refuses",
    '{"prompt": "a", "label": ["1"]}': "neither text nor a number",
    '{"prompt": "a", "label": ""}': "neither text nor a number",
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_malformed_row_names_file_line_and_reason(load, bad):
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{BAD_ROWS[bad]}.*data\.on_bad_row=skip"):
        load([{"prompt": "a", "label": "1"}, bad])


def test_a_wrong_column_and_a_long_prompt_name_the_key_that_mends_it(load):
    row = {"question": "1+1=", "label": "2"}
    with pytest.raises(DataError, match=r"only 'question', 'label'\. Set data\.prompt_key to one of them"):
        load([row])
    with pytest.raises(DataError, match=r"Set data\.label_key to one of them, or to null where there is none"):
        load([row], prompt_key="question", label_key="answer")
    with pytest.raises(DataError, match=r"Raise rollout\.max_prompt_tokens to 5.*data\.on_long_prompt=skip"):
        load([row], prompt_key="question", max_prompt_tokens=4, on_long_prompt=OnBadRow.error)


def test_messages_name_the_dataset_that_they_are_about(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": 5, "label": 1}\n')
    mixture = MixtureData(datasets={"sums": DataConfig(path=str(path))})
    with pytest.raises(DataError, match=r"set data\.datasets\.sums\.on_bad_row=skip"):
        load_training_sets(mixture, tokenizer, max_prompt_tokens=10)
    with pytest.raises(DataError, match=r"Set eval\.datasets\.sums\.split=train"):
        load_dictionary(tmp_path, tokenizer)


def load_dictionary(folder, tokenizer):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "a", "label": "1"}])})
    splits.save_to_disk(str(folder / "splits"))
    config = DataConfig(path=str(folder / "splits"), split="test")
    return load_prompts(config, tokenizer, name="sums", max_prompt_tokens=10, at="eval.datasets.sums")


def test_rows_left_out_are_on_record(load, tmp_path):
    good = {"prompt": "a", "label": "1"}
    train = load([good, '{"prompt": '], on_bad_row=OnBadRow.skip)
    long = load([good, {"prompt": "long", "label": "1"}], name="test", max_prompt_tokens=2)
    prompts = Prompts([train], [long])
    prompts.write_skipped(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / SKIPPED_ROWS).read_text().splitlines()]
    assert [(row["dataset"], row["place"].rpartition(", ")[2]) for row in rows] == [
        ("train", "line 2"),
        ("test", "line 2"),
    ]
    assert "5 tokens" in rows[1]["reason"]


def test_no_record_where_nothing_was_left_out(load, tmp_path):
    Prompts([load([{"prompt": "a", "label": "1"}])], []).write_skipped(tmp_path)
    assert not (tmp_path / SKIPPED_ROWS).exists()


def test_skipped_rows_are_counted_and_listed(load, caplog):
    good = {"prompt": "a", "label": "1"}
    loaded = load([good, *BAD_ROWS, good], on_bad_row=OnBadRow.skip)
    assert len(loaded.prompts) == 2
    assert [row.place.rpartition(" ")[2] for row in loaded.malformed] == [str(2 + i) for i in range(len(BAD_ROWS))]
    assert all(reason in row.reason for row, reason in zip(loaded.malformed, BAD_ROWS.values(), strict=True))
    assert f"{len(BAD_ROWS)} rows skipped" in caplog.text
    assert f"and {len(BAD_ROWS) - 5} more" in caplog.text


def test_long_prompts(load):
    rows = [{"prompt": "x" * 9, "label": "1"}, {"prompt": "x" * 10, "label": "1"}]
    loaded = load(rows, max_prompt_tokens=10)
    assert [len(p.tokens) for p in loaded.prompts] == [10]
    assert "11 tokens, more than rollout.max_prompt_tokens=10" in loaded.too_long[0].reason
    with pytest.raises(DataError, match=r"line 2: .*11 tokens.*data\.on_long_prompt=skip"):
        load(rows, max_prompt_tokens=10, on_long_prompt=OnBadRow.error)


def test_nothing_left(load):
    with pytest.raises(DataError, match="not a single prompt"):
        load([{"prompt": "long", "label": "1"}], max_prompt_tokens=2)
    with pytest.raises(DataError, match=r"not a single prompt \(offset 5\)"):
        load([{"prompt": "a", "label": "1"}], offset=5)


def test_ids_depend_on_row_and_content_only(load):
    rows = [{"prompt": "a", "label": "1", "note": i} for i in range(3)]
    first = [p.id for p in load(rows).prompts]
    assert len(set(first)) == 3
    assert [p.id for p in load(rows, offset=1).prompts] == first[1:]
    changed = [p.id for p in load([rows[0], {"prompt": "b", "label": "1"}, rows[2]]).prompts]
    assert [a == b for a, b in zip(first, changed, strict=True)] == [True, False, True]
    assert load(rows, name="other").prompts[0].id != first[0]


def test_chat_settings_without_a_chat_template(load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match=r"data\.apply_chat_template=false"):
        load([{"prompt": "a", "label": "1"}], apply_chat_template=True)
    with pytest.raises(DataError, match=r"data\.system_prompt is set, but the prompts are plain text"):
        load([{"prompt": "a", "label": "1"}], system_prompt="s")
    with pytest.raises(DataError, match="no chat template"):
        load([{"prompt": [{"role": "user", "content": "a"}], "label": "1"}])


def test_mixture(tmp_path, tokenizer):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "label": "1"}) + "\n")
    datasets = {
        name: DataConfig(path=str(tmp_path / f"{name}.jsonl"), weight=w) for name, w in (("a", 2.0), ("b", 1.0))
    }
    sets = load_training_sets(MixtureData(datasets=datasets), tokenizer, max_prompt_tokens=10)
    assert [(s.name, s.weight, s.prompts[0].text, s.prompts[0].dataset) for s in sets] == [
        ("a", 2.0, "a", "a"),
        ("b", 1.0, "b", "b"),
    ]


def test_overlap_of_train_and_evaluation_is_refused(load):
    rows = [{"prompt": f"p{i}", "label": "1"} for i in range(6)]
    train = load(rows, n_rows=4)
    check_disjoint([train], [load(rows, name="heldout", offset=4)])
    with pytest.raises(
        DataError, match=r"eval\.datasets\.heldout: 1 of 3 prompts are also trained on.*offset and n_rows"
    ):
        check_disjoint([train], [load(rows, name="heldout", offset=3)])


def test_a_teacher_that_is_not_there(load):
    rows = [{"prompt": str(i), "label": "x", "who": "maths" if i else "default"} for i in range(3)]
    train = load(rows, teacher_key="who")
    check_teachers([train], {"default", "maths"})
    with pytest.raises(DataError, match=r"train: 2 of 3 prompts ask for a teacher.*'maths'; there are 'default'"):
        check_teachers([train], ["default"])
