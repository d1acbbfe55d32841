"""Documents with a class each, from one file: read, checked and split."""

import logging
import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_longformer.unfinished import taken_back_if_interrupted

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

# What a file is, and the method of Dataset that reads it. The functions import datasets themselves:
# who wants only the rest of the package needs none.
_READERS = {
    ".csv": ("csv", "from_csv"),
    ".json": ("JSON", "from_json"),
    ".jsonl": ("JSON lines", "from_json"),
    ".parquet": ("Parquet", "from_parquet"),
}


def load_labelled_documents(
    path: str | Path, *, text_column: str = "text", label_column: str = "label"
) -> "Dataset":
    """Read the documents and classes of a csv, json, jsonl or parquet file.

    Documents that occur twice are kept once: split at random, the same text would stand on both
    sides.

    Args:
        path: The file; its ending says what it is.
        text_column: Column of the documents.
        label_column: Column of the classes: whole numbers, strings or booleans.

    Returns:
        A data set with the columns "text" and "label" (a ClassLabel feature, names in sorted
        order).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as what its ending says, a column is missing or has no value
            somewhere, or there are not at least two classes with two documents each.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a csv, json, jsonl or parquet file")
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path} ends in {path.suffix!r}, allowed are {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    kind, method = _READERS[path.suffix.lower()]
    read = getattr(Dataset, method)
    with (
        tempfile.TemporaryDirectory() as cache,
        taken_back_if_interrupted(partial(shutil.rmtree, cache, ignore_errors=True)),
    ):
        try:
            table = read(str(path), cache_dir=cache, keep_in_memory=True)
        except (DatasetsError, ValueError, TypeError) as error:
            reason = error.__cause__ or error
            raise ValueError(f"{path} cannot be read as {kind}: {reason}") from error
    for column, option in ((text_column, "text"), (label_column, "label")):
        if column not in table.column_names:
            raise ValueError(
                f"{path} has no column {column!r} for the {option}; "
                f"it has {', '.join(map(repr, table.column_names)) or 'none'}"
            )
    return with_class_labels(table[text_column], table[label_column], str(path))


def with_class_labels(texts, labels, source: str) -> "Dataset":
    """Check documents and classes, drop repeated documents and number the classes.

    Args:
        texts: One document each.
        labels: Their classes, whole numbers, strings or booleans.
        source: Where they come from, for messages.

    Raises:
        ValueError: As `load_labelled_documents`.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    label_by_text: dict[str, str | int] = {}
    num_rows = 0
    for row, (text, label) in enumerate(zip(texts, labels)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{source}: row {row} has no text")
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if not isinstance(label, str | int) or label == "":
            raise ValueError(
                f"{source}: row {row} has the label {label!r}; a whole number or a string is needed"
            )
        label_by_text.setdefault(text, label)
        num_rows += 1
    if num_rows > len(label_by_text):
        logger.info("%s: left out %d repeated documents", source, num_rows - len(label_by_text))
    counts = Counter(label_by_text.values())
    if len(counts) < 2:
        raise ValueError(
            f"{source} has the classes {list(counts)}; at least two different labels are needed"
        )
    rarest, count = min(counts.items(), key=lambda item: item[1])
    if count < 2:
        raise ValueError(
            f"{source}: the class {rarest!r} has one document; at least two of each class are "
            "needed "
            f"({len(counts)} classes in {len(label_by_text)} documents)"
        )
    classes = sorted(counts, key=lambda label: (isinstance(label, str), label))
    number = {label: index for index, label in enumerate(classes)}
    features = Features({"text": Value("string"), "label": ClassLabel(names=[*map(str, classes)])})
    rows = {
        "text": list(label_by_text),
        "label": [number[label] for label in label_by_text.values()],
    }
    return Dataset.from_dict(rows, features=features)


def stratified_split(
    documents: "Dataset", *, test_fraction: float = 0.2, seed: int = 0
) -> "DatasetDict":
    """Split at random into "train" and "test", every class in the same proportion.

    Args:
        documents: What `load_labelled_documents` returns.
        test_fraction: Part of the documents to hold out; at least as many as there are classes are.
        seed: Seed of the split.
    """
    num_classes = documents.features["label"].num_classes
    test_size = max(num_classes, round(test_fraction * len(documents)))
    return documents.train_test_split(test_size=test_size, stratify_by_column="label", seed=seed)
