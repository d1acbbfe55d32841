import json

import pytest

from adaptive_longformer.training.document_pairs import load_document_pairs


def write(folder, *rows):
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


def test_summaries_and_queries_are_read(tmp_path):
    queries = [{"query": "a", "answer": "b"}, {"query": "c", "answer": "d"}]
    file = write(
        tmp_path,
        {"document": "one", "summary": "1"},
        {"document": "two", "query": "how many?", "summary": ["2", "two"]},
        {"document": "three", "queries": queries},
    )
    assert load_document_pairs(file) == [
        {"document": "one", "query": "", "targets": ["1"]},
        {"document": "two", "query": "how many?", "targets": ["2", "two"]},
        {"document": "three", "query": "a", "targets": ["b"]},
        {"document": "three", "query": "c", "targets": ["d"]},
    ]


def test_columns_have_the_names_of_the_file(tmp_path):
    file = write(tmp_path, {"article": "text", "abstract": "short"})
    pairs = load_document_pairs(file, document_column="article", target_column="abstract")
    assert pairs == [{"document": "text", "query": "", "targets": ["short"]}]


@pytest.mark.parametrize(
    "row, words",
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is no JSON object"),
        ({"text": "x"}, "line 2 has no text in 'document'; it has text"),
        ({"document": " ", "summary": "y"}, "line 2 has no text"),
        ({"document": "x"}, "neither 'summary' nor 'queries'"),
        ({"document": "x", "summary": 3}, "target 3"),
        ({"document": "x", "summary": []}, "texts are needed"),
        ({"document": "x", "queries": [{"query": "a"}]}, "query 'a' with target None"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        load_document_pairs(write(tmp_path, {"document": "x", "summary": "y"}, row))


def test_no_file_and_an_empty_file_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        load_document_pairs(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        load_document_pairs(write(tmp_path, "", "\n"))
