"""Long documents with texts to write about them: summaries, or questions and their answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from adaptive_longformer.training.data_files import read_rows, text_of


class DocumentPair(TypedDict):
    """A document and what is to be written about it.

    Attributes:
        document: the text that is read.
        query: the question, or the topic of the summary; "" if there is none.
        targets: right texts, at least one; the first one is trained on.
    """

    document: str
    query: str
    targets: list[str]


def load_document_pairs(
    path: str | Path, *, document_column: str = "document", target_column: str = "summary"
) -> list[DocumentPair]:
    """Read a data file, one document per row, as a line of a jsonl file.

    A row has a target (a text or a list of texts) and possibly a "query", or "queries", a list of
    {"query", "answer"}. The pairs of one document share its text.

    Args:
        path: the file.
        document_column: field of the document.
        target_column: field of the summary or the answers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row is not as described, or there is none; the message names it.
    """
    return [
        pair
        for place, row in read_rows(path)
        for pair in pairs_of_row(place, row, document_column, target_column)
    ]


def pairs_of_row(
    place: str, row: dict[str, Any], document_column: str, target_column: str
) -> Iterator[DocumentPair]:
    """The pairs of one row; see `load_document_pairs`."""
    document = text_of(place, row, document_column)
    if target_column in row:
        found = [(row.get("query") or "", row[target_column])]
    elif isinstance(queries := row.get("queries"), list) and all(
        isinstance(entry, dict) for entry in queries
    ):
        found = [(entry.get("query"), entry.get("answer")) for entry in queries]
    else:
        raise ValueError(
            f"{place} has neither {target_column!r} nor 'queries'; it has {', '.join(row)}"
        )
    for query, target in found:
        targets = [target] if isinstance(target, str) else target
        is_text = isinstance(targets, list) and all(isinstance(text, str) for text in targets)
        if not isinstance(query, str) or not is_text or not targets:
            raise ValueError(f"{place}: query {query!r} with target {target!r}, texts are needed")
        yield DocumentPair(document=document, query=query, targets=targets)
