"""The rows of a data file, or one line that says what is wrong with which row."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ENDINGS = (".csv", ".json", ".jsonl", ".parquet")

# In a process of its own: a damaged file can end the process that reads it.
_READ_PARQUET = """
import sys, pyarrow.ipc, pyarrow.parquet
table = pyarrow.parquet.ParquetFile(sys.argv[1]).read()
table.validate(full=True)
with pyarrow.ipc.new_stream(sys.stdout.buffer, table.schema) as stream:
    stream.write_table(table)
"""


def read_rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Each row of a csv, json, jsonl or parquet file by its columns' names, and where it is.

    The name is that of one file, whatever characters are in it, and its ending says what it is. A
    json file holds a list of rows, or is as a jsonl file, a row in every line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what its ending says, or has no row; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a csv, json, jsonl or parquet file")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path} ends in {path.suffix!r}, allowed are {', '.join(ENDINGS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if ending == ".parquet":
        rows = _parquet_rows(path)
    else:
        text = _text(path)
        if ending == ".csv":
            rows = list(_csv_rows(path, text))
        elif ending == ".json" and text.lstrip().startswith("["):
            rows = [*_objects(_numbered(path, "row", _parsed(text, str(path))))]
        else:
            rows = list(_json_rows(path, text.split("\n")))
    if not rows:
        raise ValueError(f"{path} is empty, it has no rows")
    return rows


def text_of(place: str, row: dict[str, Any], column: str) -> str:
    """The text in a column of a row; raises ValueError if there is none, or nothing but space."""
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no text in {column!r}; it has {', '.join(row)}")
    return text


def stream_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_rows`, of a jsonl or parquet file of any size: a row is read when it is needed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a jsonl or parquet file")
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        batches = parquet.ParquetFile(path).iter_batches(batch_size=100)
        yield from _numbered(path, "row", (row for batch in batches for row in batch.to_pylist()))
    elif path.suffix.lower() == ".jsonl":
        with path.open(encoding="utf-8-sig") as lines:
            yield from _json_rows(path, lines)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}, only .jsonl and .parquet are streamed")


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not text in UTF-8: {error.reason}") from error


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    usual = csv.field_size_limit(2**31 - 1)  # a long document has more than the usual
    try:
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for row in lines:
            place = f"{path}, line {lines.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place} has another number of fields than the first line")
            yield place, row
    except csv.Error as error:  # in the row that begins behind the last one
        number = lines.line_num + 1
        raise ValueError(f"{path}, line {number} cannot be read as csv: {error}") from error
    finally:
        csv.field_size_limit(usual)


def _json_rows(path: Path, text: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = _numbered(path, "line", text)
    return _objects((place, _parsed(line, place)) for place, line in lines if line.strip())


def _objects(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no JSON object, but {str(row)[:40]!r}")
        yield place, row


def _parsed(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair is no letter
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON: {error}") from error


def _parquet_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    from pyarrow import ipc

    reader = subprocess.run(
        [sys.executable, "-c", _READ_PARQUET, str(path.absolute())], capture_output=True
    )
    if reader.returncode:
        reason = reader.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"{path} cannot be read as Parquet: {reason or 'it is damaged'}")
    with ipc.open_stream(reader.stdout) as stream:
        return list(_numbered(path, "row", stream.read_all().to_pylist()))


def _numbered(path: Path, what: str, rows: Iterable) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, {what} {number}", row) for number, row in enumerate(rows, start=1))
