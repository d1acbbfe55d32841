import json

import pandas
import pytest

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
        ([*ROWS, {"text": None, "label": "a"}], "row 10 has no text"),
        ([*ROWS, {"text": " ", "label": "a"}], "row 10 has no text"),
        ([*ROWS, {"text": "new", "label": None}], "row 10 has the label None"),
        ([{"text": f"{i}", "label": 0.5 * i} for i in range(4)], "row 1 has the label 0.5"),
        ([row for row in ROWS if row["label"] == "a"], "at least two different labels"),
        ([*ROWS, {"text": "new", "label": "c"}], "the class 'c' has one document"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_labelled_documents(write_rows(tmp_path / "data.jsonl", rows))


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
def test_garbage_is_named(tmp_path, ending):
    file = tmp_path / f"data{ending}"
    file.write_bytes(b"\x00\xff not data \x93" * 10)
    with pytest.raises(ValueError, match=f"data{ending} cannot be read as "):
        load_labelled_documents(file)


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_an_empty_file_is_named(tmp_path, ending):
    (tmp_path / f"data{ending}").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_labelled_documents(tmp_path / f"data{ending}")


def test_a_csv_that_is_no_text_is_named(tmp_path):
    (tmp_path / "data.csv").write_bytes(b"\x00\xff\xfe\x00" * 10)
    with pytest.raises(ValueError, match=r"data\.csv (cannot be read as csv|has no column)"):
        load_labelled_documents(tmp_path / "data.csv")


def test_a_missing_file_and_an_unknown_ending_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file; give a csv"):
        load_labelled_documents(tmp_path / "data.csv")
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
