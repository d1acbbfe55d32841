"""What the scripts in `examples/` train, evaluate and test on."""

import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from adaptive_longformer.training.data_files import read_rows, stream_rows
from adaptive_longformer.training.labelled_documents import class_names
from adaptive_longformer.training.script_arguments import DataArguments
from adaptive_longformer.training.script_run import one_line_for_mistakes

if TYPE_CHECKING:
    from datasets import IterableDataset

Example = TypeVar("Example")
Examples = Callable[[str, dict[str, Any]], Iterable[Example]]
TEST_FRACTION, EVAL_FRACTION = 0.2, 0.1
SHUFFLED = 1000  # rows of a stream that are mixed at a time


class Splits(NamedTuple):
    """Lists of examples; `train` is an IterableDataset if it is streamed.

    `eval` chooses the best model and the end of the training, `test` nothing: it may be None.
    """

    train: Any
    eval: Any
    test: Any


def load_splits(
    data: DataArguments,
    examples_of: Examples[Example],
    *,
    group: Callable[[Example], Hashable],
    stratum: Callable[[Example], Any] = lambda example: 0,
) -> Splits:
    """Reads the files, or the splits of a data set of the hub.

    If there is nothing to evaluate and to test on, a fifth is held out to test on, and a tenth of
    the rest to evaluate on; only the tenth if there is something to test on, and nothing to test on
    if there is something to evaluate on.

    Args:
        data: the options.
        examples_of: makes examples of a row; in its ValueError it names where the row stands.
        group: of an example; all of one group, as the queries about a document, stay together.
        stratum: of an example, as its class; every part has its share of each.

    Raises:
        OSError, ValueError: see `read_rows`; or there are too few examples.
    """

    def listed(split: str) -> list[Example] | None:
        if (rows := _rows(data, split)) is None:
            return None
        return [example for place, row in rows for example in examples_of(place, row)]

    evaluated, tested = listed("eval"), listed("test")
    if data.streaming:
        if evaluated is None:
            raise ValueError(f"{data.dataset} has no validation split, --eval-file is needed")
        return Splits(_stream(data, examples_of), evaluated, tested)
    train = listed("train") or []
    if evaluated is None:
        if tested is None:
            train, tested = hold_out(train, TEST_FRACTION, data.split_seed, group, stratum)
        train, evaluated = hold_out(train, EVAL_FRACTION, data.split_seed, group, stratum)
    if not train:
        raise ValueError(
            f"{data.data_file or data.dataset} has too few documents to hold some out: give "
            "--eval-file and --test-file"
        )
    return Splits(train, evaluated, tested)


def with_classes(
    data: DataArguments, splits: Splits, labels_of: Callable[[Any], Iterable[str]]
) -> tuple[Splits, list[str]]:
    """The splits and the names of their classes, those of the training examples; of those that are
    evaluated on, where the training is a stream.

    Raises:
        ValueError: there are fewer than two.
        SystemExit: an example of another part has another one; in a stream, when it comes.
    """
    known = splits.eval if data.streaming else splits.train
    names = class_names(label for example in known for label in labels_of(example))
    train, file = f"the training part of {data.data_file or data.dataset}", data.eval_file
    source = (file or f"the validation split of {data.dataset}") if data.streaming else train

    def checked(example: dict[str, Any]) -> dict[str, Any]:
        with one_line_for_mistakes():
            if unknown := set(labels_of(example)) - set(names):
                raise ValueError(
                    f"{example['row']} has the label {min(unknown)!r}; the classes are those of "
                    f"{source}: {', '.join(names)}"
                )
        return example

    for example in chain(splits.eval, splits.test or ()):
        checked(example)
    return splits._replace(
        train=splits.train.map(checked) if data.streaming else splits.train
    ), names


def hold_out(
    examples: list[Example],
    fraction: float,
    seed: int,
    group: Callable[[Example], Hashable],
    stratum: Callable[[Example], Any],
) -> tuple[list[Example], list[Example]]:
    """The rest, and a random part of the groups, of every stratum in proportion."""
    strata = {group(example): stratum(example) for example in examples}
    names = list(strata)
    random.Random(seed).shuffle(names)
    names.sort(key=lambda name: str(strata[name]))
    count = max(1, round(fraction * len(names)))
    chosen = {names[int((i + 0.5) * len(names) / count)] for i in range(count)} if names else ()
    return (
        [example for example in examples if group(example) not in chosen],
        [example for example in examples if group(example) in chosen],
    )


def _stream(data: DataArguments, examples_of: Examples) -> "IterableDataset":
    from datasets import IterableDataset

    def examples() -> Iterator[Any]:
        with one_line_for_mistakes():  # also in the middle of the training
            for place, row in _rows(data, "train") or ():
                yield from examples_of(place, row)

    next(examples(), None)  # a mistake at the start is told at the start
    return IterableDataset.from_generator(examples).shuffle(
        seed=data.split_seed, buffer_size=SHUFFLED
    )


def _rows(data: DataArguments, split: str) -> Iterable[tuple[str, dict[str, Any]]] | None:
    """The rows of a split and where they stand; None if there is no such split."""
    is_stream = data.streaming and split == "train"
    file = {"train": data.data_file, "eval": data.eval_file, "test": data.test_file}[split]
    if file is not None:
        return stream_rows(file) if is_stream else read_rows(file)
    if data.dataset is None:
        return None
    from datasets import ClassLabel, load_dataset

    loaded = load_dataset(data.dataset, streaming=is_stream)
    name = {"eval": "validation"}.get(split, split)
    if name not in loaded:
        return None
    features = loaded[name].features or {}
    names = {key: kind.names for key, kind in features.items() if isinstance(kind, ClassLabel)}
    return (
        (
            f"{data.dataset}, row {number}",
            {key: names[key][value] if key in names else value for key, value in row.items()},
        )
        for number, row in enumerate(loaded[name], start=1)
    )
