import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from opd_trainer.data.config import DataConfig, DataFormat
from opd_trainer.data.rows import read_rows
from opd_trainer.errors import DataError

ROWS = [{"prompt": f"p{i}", "label": str(i)} for i in range(6)]


def write(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        path.write_text("prompt,label\n" + "".join(f'"{row["prompt"]}",{row["label"]}\n' for row in ROWS))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "dataset":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    else:
        splits = datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
        )
        splits.save_to_disk(str(path))
    return path


def columns(config):
    return [row.columns for row in read_rows(config, "train")]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "dataset", "splits"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path = write(tmp_path, kind)
    assert columns(DataConfig(path=str(path))) == ROWS
    assert columns(DataConfig(path=str(path), offset=2, n_rows=3)) == ROWS[2:5]
    # The number is that of the file, whatever part is used: ids and messages do not move with the offset.
    assert [row.number for row in read_rows(DataConfig(path=str(path), offset=4), "train")] == [4, 5]


def test_split_of_a_dataset(tmp_path):
    path = write(tmp_path, "splits")
    assert columns(DataConfig(path=str(path), split="test")) == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'dev'.*data\.split=train\|test"):
        columns(DataConfig(path=str(path), split="dev"))


def test_format_can_be_told(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text('{"a": 1}\n')
    assert columns(DataConfig(path=str(path), format=DataFormat.jsonl)) == [{"a": 1}]
    with pytest.raises(DataError, match=r"'\.txt' names no known format.*data\.format="):
        columns(DataConfig(path=str(path)))


def test_jsonl_names_the_line_of_a_bad_row_and_ignores_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}\n')
    rows = list(read_rows(DataConfig(path=str(path)), "train"))
    assert [row.place.rpartition(", ")[2] for row in rows] == ["line 1", "line 3", "line 4", "line 5", "line 6"]
    assert [row.columns is None for row in rows] == [False, True, True, True, False]
    assert "not JSON" in rows[1].reason
    assert "it is a list" in rows[2].reason


def test_csv_with_missing_and_extra_cells(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,label\n"two\nlines",1\nonly\na,b,c\nq,2\n')
    rows = list(read_rows(DataConfig(path=str(path)), "train"))
    assert rows[0].columns == {"prompt": "two\nlines", "label": "1"}
    assert [row.columns is None for row in rows] == [False, True, True, False]
    assert rows[1].place.endswith("line 4")
    assert "2 columns" in rows[1].reason


def test_csv_of_a_spreadsheet_begins_with_a_mark(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,label\nq,1\n".encode("utf-8-sig"))
    assert columns(DataConfig(path=str(path))) == [{"prompt": "q", "label": "1"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "not JSON"),
        ("a.json", b"{}", "not a list"),
        ("a.parquet", b"PAR", "not Parquet"),
        ("a.csv", b'a,b\n"x', "not CSV"),
    ],
)
def test_files_broken_as_a_whole(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        columns(DataConfig(path=str(tmp_path / name)))


def test_missing_paths(tmp_path):
    with pytest.raises(DataError, match=r"no path is set.*data\.path"):
        columns(DataConfig())
    with pytest.raises(DataError, match="does not exist"):
        columns(DataConfig(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="not the folder of a Hugging Face dataset"):
        columns(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_folder_is_no_file(tmp_path, kind):
    with pytest.raises(DataError, match=rf"cannot be read as {kind} \(.*irectory.*Set data\.path and data\.format"):
        columns(DataConfig(path=str(tmp_path), format=DataFormat[kind]))
