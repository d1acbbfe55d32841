"""Long documents that every Python brings along: the source files of its standard library."""

import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

MIN_FILES_PER_CLASS = 20
MIN_LONG_FILES_PER_CLASS = 8
MAX_FILES_PER_CLASS = 60
MAX_CLASSES = 10
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A window of one file: its tokens without special tokens, the same window as text, and its
    class."""

    input_ids: list[int]
    text: str
    label: int


@dataclass(frozen=True)
class LabelledDocuments:
    """Train and test documents that share no file. `label_names[document.label]` is the class."""

    label_names: list[str]
    train: list[Document]
    test: list[Document]


def read_packages(library: Path | None = None, *, seed: int = 0) -> dict[str, list[str]]:
    """Source texts of every top-level package of the standard library that has enough files.

    The names of the chosen packages are replaced by "package" wherever they stand as a word, so
    that no document names its own class; paths are not part of the texts.

    Args:
        library: Folder to read; by default the standard library of the running Python.
        seed: Seed of the choice and order of the files.

    Returns:
        Package name -> texts in random order, at most `MAX_FILES_PER_CLASS` each, for at most
        `MAX_CLASSES` packages, the largest first.

    Raises:
        ValueError: If fewer than two packages have `MIN_FILES_PER_CLASS` source files.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    paths_by_package: dict[str, list[Path]] = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if len(parts) > 1 and not NOT_THE_LIBRARY.intersection(parts) and path.stat().st_size > 0:
            paths_by_package.setdefault(parts[0], []).append(path)

    large_enough = {
        name: paths for name, paths in paths_by_package.items() if len(paths) >= MIN_FILES_PER_CLASS
    }
    if len(large_enough) < 2:
        raise ValueError(
            f"The Python standard library at {library} has {len(large_enough)} packages with at "
            "least "
            f"{MIN_FILES_PER_CLASS} source files; two are needed. Pass your own documents with "
            "--data FILE."
        )
    names = sorted(large_enough, key=lambda name: (-len(large_enough[name]), name))[:MAX_CLASSES]
    any_name = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    rng = random.Random(seed)
    texts_by_package: dict[str, list[str]] = {name: [] for name in names}
    for name in names:
        paths = large_enough[name]
        for path in rng.sample(paths, min(len(paths), MAX_FILES_PER_CLASS)):
            # The library's own tests hold files that are not valid text on purpose.
            text = path.read_text(encoding="utf-8", errors="replace")
            texts_by_package[name].append(any_name.sub("package", text))
    return texts_by_package


def cut_documents(
    texts_by_package: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_per_class: int = 40,
    test_per_class: int = 12,
    min_length: int = 1024,
    max_length: int = 4096,
    seed: int = 0,
) -> LabelledDocuments:
    """Cut windows of `min_length` to `max_length` tokens and split them by file, the same number
    for every class.

    Args:
        texts_by_package: What `read_packages` returns.
        tokenizer: Its special tokens are not part of the windows, but `max_length` leaves room for
            them.
        train_per_class: Windows per class to train on. A file may give several, which may overlap.
        test_per_class: Windows per class of the held-out quarter of the files.
        min_length: Shortest window in tokens; shorter files are left out.
        max_length: Longest window in tokens, special tokens included.
        seed: Seed of the split and of the windows.

    Raises:
        ValueError: If fewer than two classes have `MIN_LONG_FILES_PER_CLASS` files of `min_length`
            tokens.
    """
    rng = random.Random(seed)
    max_window = max_length - tokenizer.num_special_tokens_to_add()
    token_ids_by_package = {}
    for name, texts in texts_by_package.items():
        token_ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        token_ids = [ids for ids in token_ids if len(ids) >= min_length]
        if len(token_ids) >= MIN_LONG_FILES_PER_CLASS:
            token_ids_by_package[name] = token_ids
    if len(token_ids_by_package) < 2:
        raise ValueError(
            f"Only {len(token_ids_by_package)} packages of the standard library have "
            f"{MIN_LONG_FILES_PER_CLASS} files "
            f"of at least {min_length} tokens; two are needed. Pass your own documents with --data "
            "FILE."
        )

    def windows(files: Sequence[list[int]], count: int, label: int) -> list[Document]:
        """`count` windows, taken from the files in turn."""
        documents = []
        for index in range(count):
            ids = files[index % len(files)]
            longest = max(min_length, min(len(ids), max_window))
            length = round(rng.triangular(min_length, longest, min_length))  # short ones are more
            start = rng.randint(0, len(ids) - length)
            window = ids[start : start + length]
            documents.append(Document(window, str(tokenizer.decode(window)), label))
        return documents

    train, test = [], []
    for label, files in enumerate(token_ids_by_package.values()):
        num_test_files = max(2, len(files) // 4)
        test += windows(files[:num_test_files], test_per_class, label)
        train += windows(files[num_test_files:], train_per_class, label)
    return LabelledDocuments(list(token_ids_by_package), train, test)
