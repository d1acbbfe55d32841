"""Long documents with texts to write about them: summaries, or questions and their answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict


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
    """Read a JSON lines file, one document per line.

    A line has a target (a text or a list of texts) and possibly a "query", or "queries", a list of
    {"query", "answer"}. The pairs of one document share its text.

    Args:
        path: the file.
        document_column: field of the document.
        target_column: field of the summary or the answers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not as described, or there is none; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a JSON lines file")
    with path.open(encoding="utf-8") as lines:
        pairs = [
            pair
            for number, line in enumerate(lines, start=1)
            if line.strip()
            for pair in _pairs(f"{path}, line {number}", line, document_column, target_column)
        ]
    if not pairs:
        raise ValueError(f"{path} is empty, at least one document is needed")
    return pairs


def _pairs(
    place: str, line: str, document_column: str, target_column: str
) -> Iterator[DocumentPair]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is no JSON object")
    document = row.get(document_column)
    if not isinstance(document, str) or not document.strip():
        raise ValueError(f"{place} has no text in {document_column!r}; it has {', '.join(row)}")
    if target_column in row:
        found = [(row.get("query", ""), row[target_column])]
    elif isinstance(row.get("queries"), list):
        found = [(entry.get("query"), entry.get("answer")) for entry in row["queries"]]
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
