"""Reading a document from a file or from standard input."""

import sys
from pathlib import Path


def read_document(file: str) -> str:
    """The text of a file, or of standard input if the name is "-".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in UTF-8, or empty.
    """
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    name = "standard input" if file == "-" else file
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{name} is empty, a text is needed")
    return text
