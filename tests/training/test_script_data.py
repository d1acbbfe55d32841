import json

import pytest

from adaptive_longformer.training.data_files import read_rows, stream_rows
from adaptive_longformer.training.script_arguments import DataArguments
from adaptive_longformer.training.script_data import hold_out, load_splits, with_classes


def rows_of(count):
    return [{"text": f"document {i // 2}", "label": "abb"[i // 2 % 3]} for i in range(count)]


@pytest.fixture
def files(tmp_path):
    for name, count in (("train", 60), ("other", 4)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows_of(count))))
    return tmp_path


def splits(files, **more):
    data = DataArguments(model="m", data_file=str(files / "train.jsonl"), **more)
    return load_splits(
        data, lambda place, row: [row], group=lambda row: row["text"],
        stratum=lambda row: row["label"],
    )  # fmt: skip


def test_what_is_held_out_is_in_one_part_only_and_has_its_share_of_every_class(files):
    found = splits(files)
    assert [len(part) for part in found] == [44, 4, 12]  # 30 documents, two rows each
    texts = [{row["text"] for row in part} for part in found]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert [row["label"] for row in found.test].count("a") == 4
    assert splits(files) == found != splits(files, split_seed=1)


def test_files_that_are_given_are_not_held_out(files):
    other = str(files / "other.jsonl")
    found = splits(files, eval_file=other)
    assert (len(found.train), len(found.eval), found.test) == (60, 4, None)
    found = splits(files, test_file=other)
    assert (len(found.train), len(found.eval), len(found.test)) == (54, 6, 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub_has_its_own_splits_and_the_names_of_its_classes(
    tmp_path, monkeypatch, streaming
):
    from datasets import ClassLabel, Dataset, Features, Value

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    (tmp_path / "data").mkdir()
    for name, count in (("train", 6), ("validation", 3), ("test", 2)):
        rows = {"text": [f"{name} {i}" for i in range(count)], "label": [1] * count}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / f"{name}.parquet")
    data = DataArguments(model="m", dataset=str(tmp_path / "data"), streaming=streaming)
    found = load_splits(data, lambda place, row: [row], group=str)
    assert [len(list(part)) for part in found] == [6, 3, 2]
    assert {row["label"] for part in found for row in part} == {"good"}


def test_too_few_documents_are_said():
    assert hold_out([], 0.2, 0, str, str) == ([], [])
    assert hold_out(["a"], 0.2, 0, str, str) == ([], ["a"])


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_stream_has_the_rows_of_the_file(files, ending):
    file = files / "train.jsonl"
    if ending == "parquet":
        import pandas

        pandas.DataFrame(rows_of(60)).to_parquet(files / "train.parquet")
        file = files / "train.parquet"
    assert list(stream_rows(file)) == read_rows(file)


def test_a_stream_is_read_when_it_is_needed(files):
    (files / "bad.jsonl").write_text('{"text": "a"}\nno json')
    rows = stream_rows(files / "bad.jsonl")
    assert next(rows)[1] == {"text": "a"}
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        next(rows)
    with pytest.raises(ValueError, match=r"only \.jsonl and \.parquet are streamed"):
        next(stream_rows(__file__))


def test_a_mistake_in_the_middle_of_a_stream_ends_with_one_line(files):
    with (files / "train.jsonl").open("a") as file:
        file.write("\nno json")
    found = splits(files, streaming=True, eval_file=str(files / "other.jsonl"))
    with pytest.raises(SystemExit, match="line 61 is no JSON"):
        list(found.train)


@pytest.mark.parametrize("part", ["train", "eval", "test"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_label_of_one_part_only_ends_with_one_line(tmp_path, part, streaming):
    given = {}
    for name in ("train", "eval", "test"):
        rows = rows_of(20) + [{"text": "z", "label": "new"}] * (name == part)
        given[name] = tmp_path / f"{name}.jsonl"
        given[name].write_text("\n".join(map(json.dumps, rows)))
    data = DataArguments(
        model="m", data_file=str(given["train"]), eval_file=str(given["eval"]),
        test_file=str(given["test"]), streaming=streaming,
    )  # fmt: skip
    found = load_splits(data, lambda place, row: [{**row, "row": place}], group=str)
    if part == ("eval" if streaming else "train"):  # others may lack a class
        found, names = with_classes(data, found, lambda row: [row["label"]])
        assert names == ["a", "b", "new"]
        assert len(list(found.train)) == 20 + (not streaming)
        return
    with pytest.raises(SystemExit) as stop:
        list(with_classes(data, found, lambda row: [row["label"]])[0].train)
    source = given["eval"] if streaming else f"the training part of {given['train']}"
    assert str(stop.value) == (
        f"{given[part]}, line 21 has the label 'new'; the classes are those of {source}: a, b"
    )


def test_a_stream_is_shuffled_and_complete(files):
    found = splits(files, streaming=True, eval_file=str(files / "other.jsonl"))
    rows = list(found.train)
    assert rows != rows_of(60)
    assert sorted(rows, key=str) == sorted(rows_of(60), key=str)
