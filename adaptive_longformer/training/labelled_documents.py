"""Documents with a class each, from one file: read, checked and split."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_longformer.training.data_files import read_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)


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
    # Imported here: who wants only the rest of the package needs no datasets.
    from datasets import ClassLabel, Dataset, Features, Value

    rows = read_rows(path)
    columns = {name: None for _, row in rows for name in row}  # in their order
    for column, option in ((text_column, "text"), (label_column, "label")):
        if column not in columns:
            raise ValueError(
                f"{path} has no column {column!r} for the {option}; "
                f"it has {', '.join(map(repr, columns)) or 'none'}"
            )
    label_by_text: dict[str, Any] = {}
    for place, row in rows:
        text = row.get(text_column)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place} has no text")
        label_by_text.setdefault(text, read_label(place, row.get(label_column)))
    if len(rows) > len(label_by_text):
        logger.info("%s: left out %d repeated documents", path, len(rows) - len(label_by_text))
    counts = Counter(label_by_text.values())
    if len(counts) < 2:
        raise ValueError(
            f"{path} has the classes {list(counts)}; at least two different labels are needed"
        )
    rarest, count = min(counts.items(), key=lambda item: item[1])
    if count < 2:
        raise ValueError(
            f"{path}: the class {rarest!r} has one document; at least two of each class are "
            f"needed ({len(counts)} classes in {len(label_by_text)} documents)"
        )
    classes = sorted(counts, key=order_of)
    number = {label: index for index, label in enumerate(classes)}
    features = Features({"text": Value("string"), "label": ClassLabel(names=[*map(str, classes)])})
    numbers = [number[label] for label in label_by_text.values()]
    return Dataset.from_dict({"text": list(label_by_text), "label": numbers}, features=features)


def read_label(
    place: str, label: object, problem_type: str = "single_label_classification"
) -> str | int | float | list:
    """A class, a list of classes, or a number to be found by regression.

    Raises:
        ValueError: the label is not what the problem type of Transformers' configurations asks for.
    """
    if problem_type == "regression":
        try:
            return float(label)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise ValueError(f"{place} has the label {label!r}; a number is needed") from None
    if problem_type == "multi_label_classification":
        if not isinstance(label, list):
            raise ValueError(f"{place} has the label {label!r}; a list of names is needed")
        return [read_label(place, name) for name in label]
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int) or label == "":
        raise ValueError(f"{place} has the label {label!r}; a whole number or a string is needed")
    return label


def class_names(labels: Iterable[object]) -> list[str]:
    """The names of all classes that occur, numbers in their order.

    Raises:
        ValueError: there are fewer than two.
    """
    names = set(map(str, labels))
    if len(names) < 2:
        raise ValueError(f"the labels are {sorted(names)}; at least two different ones are needed")
    return sorted(names, key=order_of)


def order_of(label: str | int) -> tuple[bool, int, str]:
    """Numbers come first; in a csv file they are text."""
    is_number = str(label).removeprefix("-").isdecimal() and len(str(label)) < 20
    return not is_number, int(label) if is_number else 0, str(label)


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
