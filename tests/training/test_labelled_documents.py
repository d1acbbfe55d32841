import json
import re

import pandas
import pytest

from adaptive_longformer.training import data_files
from adaptive_longformer.training.labelled_documents import (
    load_labelled_documents,
    stratified_split,
)

ROWS = [{"text": f"document {i}", "label": "ab"[i % 2]} for i in range(10)]


def write_rows(file, rows):
    if file.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(file, index=False)
    elif file.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path, ending):
    documents = load_labelled_documents(write_rows(tmp_path / f"data{ending}", ROWS))
    assert documents["text"][:] == [row["text"] for row in ROWS]
    assert documents["label"][:] == [0, 1] * 5
    assert documents.features["label"].names == ["a", "b"]


def test_numbers_as_labels_keep_their_order_and_columns_can_be_named(tmp_path):
    rows = [{"body": f"document {i}", "stars": 10 if i % 2 else 9} for i in range(4)]
    documents = load_labelled_documents(
        write_rows(tmp_path / "data.csv", rows), text_column="body", label_column="stars"
    )
    assert documents.features["label"].names == ["9", "10"]


def test_repeated_documents_are_kept_once(tmp_path):
    assert len(load_labelled_documents(write_rows(tmp_path / "data.jsonl", ROWS + ROWS))) == 10


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a", "klass": 1}],
            "has no column 'label' for the label; it has 'text', 'klass'",
        ),
        ([{"body": "a", "label": 1}], "has no column 'text' for the text"),
        ([*ROWS, {"text": None, "label": "a"}], "line 11 has no text"),
        ([*ROWS, {"text": " ", "label": "a"}], "line 11 has no text"),
        ([*ROWS, {"text": "new", "label": None}], "line 11 has the label None"),
        ([{"text": f"{i}", "label": 0.5 * i} for i in range(4)], "line 2 has the label 0.5"),
        ([row for row in ROWS if row["label"] == "a"], "at least two different labels"),
        ([*ROWS, {"text": "new", "label": "c"}], "the class 'c' has one document"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_labelled_documents(write_rows(tmp_path / "data.jsonl", rows))


DAMAGED = {
    "latin 1": ("data.csv", "text,label\ncafé,1".encode("latin-1"), "line 2 is not text in UTF-8"),
    "binary": ("data.jsonl", b"\x00\xff not data \x93" * 10, "line 1 is not text in UTF-8"),
    "null": ("data.json", b"null", "line 1 is no JSON object, but 'None'"),
    "numbers": ("data.json", b"[1, 2]", "row 1 is no JSON object, but '1'"),
    "cut": ("data.json", b'[{"text": "a"', "is no JSON: "),
    "second line": ("data.jsonl", b'{"text": "a", "label": 1}\n{"te', "line 2 is no JSON: "),
    "deep": ("data.jsonl", b"[" * 100_000, "line 1 is no JSON: "),
    "surrogate": ("data.jsonl", b'{"text": "\\ud800", "label": 1}', "line 1 is no JSON: "),
    "fields": ("data.csv", b"text,label\na,1\nb,2,3", "line 3 has another number of fields"),
    "short": ("data.csv", b"text,label\na,1\nb", "line 3 has another number of fields"),
    "open quote": ("data.csv", b'text,label\n"a,1\nb,2', "line 2 cannot be read as csv: unexp"),
    "only names": ("data.csv", b"text,label\n", "data.csv is empty, it has no rows"),
    "blank": ("data.jsonl", b"\n \n", "data.jsonl is empty, it has no rows"),
    "no parquet": ("data.parquet", b"PAR1 is not enough", "data.parquet cannot be read as Parquet"),
}


@pytest.mark.parametrize("name, content, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_labelled_documents(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_parquet_file_that_ends_its_reader_is_an_error(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "data.parquet", ROWS)
    monkeypatch.setattr(data_files, "_READ_PARQUET", "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(ValueError, match=r"data\.parquet cannot be read as Parquet: it is damaged"):
        load_labelled_documents(file)


def test_bytes_that_change_in_a_parquet_file_end_in_rows_or_an_error(tmp_path):
    content = bytearray(write_rows(tmp_path / "data.parquet", ROWS).read_bytes())
    for place in (40, len(content) // 2, len(content) - 60):
        damaged = bytearray(content)
        damaged[place : place + 8] = b"\xff" * 8
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        try:
            assert len(load_labelled_documents(tmp_path / "damaged.parquet")) <= 10
        except ValueError as error:
            assert str(error).count("\n") == 0


@pytest.mark.parametrize("name", ["a::b.csv", "a[1].csv", "x*.csv", "d?.jsonl", "{1,2}.json"])
def test_every_name_is_that_of_one_file(tmp_path, name):
    for other in ("a1.csv", "b.csv", "xy.csv", "de.jsonl", "1.json"):
        write_rows(tmp_path / other, [{"text": other, "label": "other"}] * 4)
    documents = load_labelled_documents(write_rows(tmp_path / name, ROWS))
    assert documents["text"][:] == [row["text"] for row in ROWS]


def test_a_document_may_be_longer_than_a_csv_field_usually_is(tmp_path):
    rows = [{"text": f"{i}" + ' "long"\n, text' * 20_000, "label": i % 2} for i in range(4)]
    documents = load_labelled_documents(write_rows(tmp_path / "data.csv", rows))
    assert documents["text"][:] == [row["text"] for row in rows]


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_an_empty_file_is_named(tmp_path, ending):
    (tmp_path / f"data{ending}").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_labelled_documents(tmp_path / f"data{ending}")


def test_a_missing_file_and_an_unknown_ending_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file; give a csv"):
        load_labelled_documents(tmp_path / "data.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.csv is no file"):
        load_labelled_documents(tmp_path / "folder.csv")
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"ends in '\.xlsx', allowed are \.csv"):
        load_labelled_documents(tmp_path / "data.xlsx")


def test_split_is_stratified_repeatable_and_without_overlap(tmp_path):
    rows = [{"text": f"document {i}", "label": int(i % 5 == 0)} for i in range(100)]
    documents = load_labelled_documents(write_rows(tmp_path / "data.jsonl", rows))
    split = stratified_split(documents, seed=3)
    assert len(split["test"]) == 20 and sum(split["test"]["label"]) == 4
    assert not set(split["train"]["text"]) & set(split["test"]["text"])
    assert split["test"]["text"][:] == stratified_split(documents, seed=3)["test"]["text"][:]
