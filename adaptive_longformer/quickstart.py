"""The command `adaptive-longformer quickstart`: the whole way from a Longformer to a fine-tuned
long-document model."""

import argparse
import gc
import logging
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from adaptive_longformer.command_inputs import load_tokenizer, silence_transformers
from adaptive_longformer.conversion.checkpoint import read_json
from adaptive_longformer.conversion.convert import ConversionReport, convert_checkpoint
from adaptive_longformer.conversion.families import FAMILIES
from adaptive_longformer.conversion.source import check_family, locate
from adaptive_longformer.conversion.target import ENCODER
from adaptive_longformer.gpu import has_bfloat16_gpu
from adaptive_longformer.training.labelled_documents import (
    load_labelled_documents,
    stratified_split,
)
from adaptive_longformer.training.metrics import classification_metrics
from adaptive_longformer.training.small_longformer import (
    train_byte_level_tokenizer,
    write_small_longformer,
)
from adaptive_longformer.training.source_code_documents import (
    Document,
    LabelledDocuments,
    cut_documents,
    read_packages,
)
from adaptive_longformer.unfinished import taken_back_if_interrupted

MAX_DOCUMENTS = 1000
TIMED_DOCUMENTS = 2
TIMED_REPEATS = 3
# From random weights, and from a pretrained --source.
LEARNING_RATE_FROM_SCRATCH = 1e-3
LEARNING_RATE = 5e-5


def run(args: argparse.Namespace) -> int:
    """Run all steps, print one line for each and a table at the end.

    Returns:
        0, or 1 if the reloaded model did not give the logits of the saved one.
    """
    if args.epochs < 1:
        raise ValueError(f"--epochs is {args.epochs}, a whole number >= 1 is needed")
    if args.max_length < 16:
        raise ValueError(f"--max-length is {args.max_length}, a whole number >= 16 is needed")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, a whole number >= 0 is needed")
    _silence_known_noise()
    say = _Steps()
    data = None
    if args.data is not None:
        data = load_labelled_documents(
            args.data, text_column=args.text_column, label_column=args.label_column
        )
    source = None if args.source is None else _locate_encoder(args.source)
    output = Path(args.output or time.strftime("runs/quickstart-%Y%m%d-%H%M%S"))
    with _new_folder(output):
        say(f"writing to {output}")
        return _take_all_steps(args, data, source, output, say)


def _take_all_steps(
    args: argparse.Namespace, data: Dataset | None, source: Path | None, output: Path, say: "_Steps"
) -> int:
    documents, tokenizer = _documents(args, data, source, say)
    if source is None:
        source = output / "longformer"
        write_small_longformer(
            source, tokenizer, documents.label_names, max_length=args.max_length, seed=args.seed
        )
        say(f"a small Longformer with random weights in {source}")

    converted = output / "converted"
    report = convert_checkpoint(
        source, converted, max_positions=_positions_needed(source, args.max_length), verify=True
    )
    say(
        f"converted {report.num_parameters:,} parameters, "
        f"logits differ by at most {report.max_logit_difference:.1e}"
    )

    timing = time_both(source, converted, documents, tokenizer, seed=args.seed)
    say(f"timed both models on {timing.what}")

    baseline = bag_of_words_accuracy(documents)
    say(f"bag-of-words baseline: {baseline:.1%} balanced accuracy")

    from_scratch = args.source is None
    before, after, trainer = fine_tune(
        converted,
        documents,
        tokenizer,
        output / "training",
        learning_rate=LEARNING_RATE_FROM_SCRATCH if from_scratch else LEARNING_RATE,
        epochs=args.epochs,
        seed=args.seed,
    )
    say(f"fine-tuned {args.epochs} epochs: {before:.1%} -> {after:.1%} balanced accuracy")

    fine_tuned = output / "fine-tuned"
    trainer.save_model(str(fine_tuned))
    tokenizer.save_pretrained(fine_tuned)
    difference = reload_difference(trainer, fine_tuned)
    say(f"saved to {fine_tuned}, reloaded: logits differ by {difference:.1e}")

    print(_table(report, timing, documents, baseline, before, after, difference, say.total()))
    if difference > 1e-5:
        print("The reloaded model gives other logits than the saved one.", file=sys.stderr)
        return 1
    print(f'\nUse it:  AutoModelForSequenceClassification.from_pretrained("{fine_tuned}")')
    return 0


class _Steps:
    """Prints what was done and how long it took."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def __call__(self, what: str) -> None:
        now = time.perf_counter()
        print(f"[{now - self._last:6.1f} s] {what}", flush=True)
        self._last = now

    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._start


def _silence_known_noise() -> None:
    """Bars of saving and loading small files, and advice that does not apply to what is done
    here."""
    disable_progress_bars()
    silence_transformers()
    logging.getLogger("datasets").setLevel(logging.ERROR)


def _locate_encoder(source: str) -> Path:
    """The folder of a checkpoint that can be converted and classified with."""
    folder = locate(source, FAMILIES)
    model_type = read_json(folder / "config.json").get("model_type")
    check_family(model_type, FAMILIES)
    encoders = [name for name, family in FAMILIES.items() if family.target is ENCODER]
    if model_type not in encoders:
        raise ValueError(
            f"--source: {source} is of model_type {model_type!r}, an encoder-decoder; allowed are "
            f"{', '.join(encoders)}"
        )
    return folder


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder that is new, so that nothing is overwritten; an interrupt removes it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"--output: {folder} exists and is not empty; give a new folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    undo = partial(shutil.rmtree, made[-1] if made else folder, ignore_errors=True)
    with taken_back_if_interrupted(undo):
        folder.mkdir(parents=True, exist_ok=True)
        yield


def _documents(
    args: argparse.Namespace, data: Dataset | None, source: Path | None, say: Callable[[str], None]
) -> tuple[LabelledDocuments, PreTrainedTokenizerBase]:
    """The documents, as windows of tokens, and the tokenizer that made them."""
    if data is None:
        packages = read_packages(seed=args.seed)
        num_files = sum(map(len, packages.values()))
        say(f"{num_files} source files of Python {platform.python_version()}'s standard library")
        texts = [text for texts in packages.values() for text in texts]
    else:
        split = stratified_split(_at_most(data, MAX_DOCUMENTS, args.seed), seed=args.seed)
        say(f"{len(split['train'])} + {len(split['test'])} documents of {args.data}")
        texts = split["train"]["text"]
    if source is None:
        tokenizer = train_byte_level_tokenizer(texts, max_length=args.max_length)
        say(f"trained a byte-level BPE tokenizer with {len(tokenizer):,} tokens")
    else:
        tokenizer = load_tokenizer(str(source))
    if data is None:
        documents = cut_documents(
            packages,
            tokenizer,
            max_length=args.max_length,
            min_length=min(1024, args.max_length // 2),
            seed=args.seed,
        )
    else:
        documents = LabelledDocuments(
            data.features["label"].names,
            _first_windows(split["train"], tokenizer, args.max_length),
            _first_windows(split["test"], tokenizer, args.max_length),
        )
    lengths = [len(document.input_ids) for document in documents.train + documents.test]
    say(
        f"{len(documents.train)} documents to train on and {len(documents.test)} held out, "
        f"{len(documents.label_names)} classes, {min(lengths)} to {max(lengths)} tokens"
    )
    return documents, tokenizer


def _at_most(data: Dataset, count: int, seed: int) -> Dataset:
    """The data, or as much of it as a quickstart should read, every class in the same
    proportion."""
    if len(data) <= count:
        return data
    return stratified_split(data, test_fraction=count / len(data), seed=seed)["test"]


def _first_windows(
    data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Document]:
    token_ids = tokenizer(list(data["text"]), add_special_tokens=False, verbose=False)["input_ids"]
    size = max_length - tokenizer.num_special_tokens_to_add()
    return [
        Document(ids[:size], str(tokenizer.decode(ids[:size])), label)
        for ids, label in zip(token_ids, data["label"])
    ]


def _positions_needed(source: Path, max_length: int) -> int | None:
    """What to ask of the conversion: more positions only where the source has too few."""
    rows = AutoConfig.from_pretrained(source).max_position_embeddings
    return None if max_length <= rows else max_length


def _encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict]:
    """What the collator takes: token ids with the special tokens around them, and labels."""
    first, last, size = tokenizer.cls_token_id, tokenizer.sep_token_id, max_length - 2
    return [
        {"input_ids": [first, *document.input_ids[:size], last], "label": document.label}
        for document in documents
    ]


@dataclass(frozen=True)
class Timing:
    """Seconds and bytes of both models on the same documents: (source, ours)."""

    what: str
    forward: tuple[float, float]
    training_step: tuple[float, float]
    training_memory: tuple[int, int] | None


def time_both(
    source: Path,
    converted: Path,
    documents: LabelledDocuments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    repeats: int = TIMED_REPEATS,
) -> Timing:
    """Time the source and the converted model on the longest held-out documents, in turns.

    BERT and RoBERTa are timed on as many tokens as they can read; on a GPU both by autocast to
    bfloat16, if it computes in it. The median of the repeats counts, after one run of each to warm
    up, on which the memory is measured (where the system can tell: Linux, and GPUs).
    """
    device = _device()
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(documents.label_names), ignore_mismatched_sizes=True
        ).to(device)
        # Ours first: memory that the first one leaves to the second is in the source's favour.
        for name, folder in (("ours", converted), ("source", source))
    }
    max_length = min(_max_length(model) for model in models.values())
    longest = sorted(documents.test, key=lambda document: -len(document.input_ids))
    examples = _encode(longest[:TIMED_DOCUMENTS], tokenizer, max_length)
    padded = DataCollatorWithPadding(tokenizer)(examples)
    batch = {name: tensor.to(device) for name, tensor in padded.items()}

    seconds: dict[str, list[float]] = {}
    memory = {}
    torch.manual_seed(seed)
    for repeat in range(repeats + 1):
        for name, model in models.items():
            forward, step = partial(_forward, model, batch), partial(_training_step, model, batch)
            if repeat == 0:
                forward()
                memory[name] = _peak_memory(step, device)
            else:
                seconds.setdefault(f"{name} forward", []).append(_seconds(forward, device))
                seconds.setdefault(f"{name} step", []).append(_seconds(step, device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    length = max(len(example["input_ids"]) for example in examples)
    measured = all(memory.values())
    return Timing(
        what=f"{len(examples)} documents of up to {length} tokens{_where()}",
        forward=(median["source forward"], median["ours forward"]),
        training_step=(median["source step"], median["ours step"]),
        training_memory=(memory["source"], memory["ours"]) if measured else None,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _where() -> str:
    """The GPU and the type of autocast there; nothing on a CPU."""
    if not torch.cuda.is_available():
        return ""
    return f" on {torch.cuda.get_device_name()}" + (", bfloat16" if has_bfloat16_gpu() else "")


def _autocast() -> torch.autocast:
    """Computes as the Trainer does here."""
    return torch.autocast(_device().type, torch.bfloat16, enabled=has_bfloat16_gpu())


def _max_length(model: PreTrainedModel) -> int:
    """The longest input, for the positions of RoBERTa and Longformer start after the padding id."""
    config = model.config
    if config.model_type == "adaptive_sparse":
        return config.max_sequence_length
    is_bert = config.model_type == "bert"
    return config.max_position_embeddings - (0 if is_bert else config.pad_token_id + 1)


def _forward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    model.eval()
    with torch.no_grad(), _autocast():
        model(**batch)


def _training_step(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    model.train()
    with _autocast():
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_memory(call: Callable[[], None], device: torch.device) -> int | None:
    """The bytes that a call uses above what was used before; None where it cannot be told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux starts a new peak
    except OSError:
        return None
    before = _resident_memory("VmRSS")
    call()
    return _resident_memory("VmHWM") - before


def _resident_memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def bag_of_words_accuracy(documents: LabelledDocuments) -> float:
    """Balanced held-out accuracy of TF-IDF and logistic regression on the same windows."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    train = vectorizer.fit_transform([document.text for document in documents.train])
    test = vectorizer.transform([document.text for document in documents.test])
    classifier = LogisticRegression(C=10.0, max_iter=1000)
    classifier.fit(train, [document.label for document in documents.train])
    labels = [document.label for document in documents.test]
    return float(balanced_accuracy_score(labels, classifier.predict(test)))


def fine_tune(
    converted: Path,
    documents: LabelledDocuments,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    learning_rate: float,
    epochs: int,
    seed: int,
) -> tuple[float, float, Trainer]:
    """Fine-tune a converted checkpoint with the standard Trainer.

    Returns:
        Balanced held-out accuracy before and after, and the trainer.
    """
    names = documents.label_names
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        converted,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    max_length = model.config.max_sequence_length
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            warmup_steps=0.1,
            weight_decay=0.01,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=8,
            train_sampling_strategy="group_by_length",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
            seed=seed,
            bf16=has_bfloat16_gpu(),
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=Dataset.from_list(_encode(documents.train, tokenizer, max_length)),
        eval_dataset=Dataset.from_list(_encode(documents.test, tokenizer, max_length)),
        compute_metrics=classification_metrics,
    )
    before = trainer.evaluate()["eval_balanced_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_balanced_accuracy"]
    return before, after, trainer


def reload_difference(trainer: Trainer, folder: Path) -> float:
    """Largest difference of the logits of a trained model and of the same model read back from a
    folder."""
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder)
    other = Trainer(reloaded, trainer.args, trainer.data_collator)
    documents: Any = trainer.eval_dataset
    documents = documents.select(range(min(4, len(documents))))
    logits: Any = trainer.predict(documents).predictions
    return float(abs(logits - other.predict(documents).predictions).max())


def _table(
    report: ConversionReport,
    timing: Timing,
    documents: LabelledDocuments,
    baseline: float,
    before: float,
    after: float,
    difference: float,
    total: float,
) -> str:
    def times(name: str, pair: tuple[float, float]) -> str:
        return f"{name:<34}{pair[0]:>10.2f} s{pair[1]:>12.2f} s{pair[0] / pair[1]:>9.1f}x faster"

    source = f"{report.source_model_type} (HF)"
    lines = [
        "",
        f"{'':<34}{source:>12}{'ours':>14}",
        times("forward", timing.forward),
        times("training step", timing.training_step),
    ]
    if timing.training_memory:
        theirs, ours = (number / 2**20 for number in timing.training_memory)
        share = f"{ours / theirs:>9.0%} of it"
        lines.append(f"{'training memory':<34}{theirs:>8,.0f} MiB{ours:>10,.0f} MiB{share}")
    lines += [
        f"{'':<34}({timing.what})",
        f"{'largest logit difference':<34}{report.max_logit_difference:>26.1e}",
        "",
        f"balanced accuracy on {len(documents.test)} held-out documents",
        f"{'  chance':<34}{1 / len(documents.label_names):>26.1%}",
        f"{'  bag of words':<34}{baseline:>26.1%}",
        f"{'  ours before fine-tuning':<34}{before:>26.1%}",
        f"{'  ours after fine-tuning':<34}{after:>26.1%}",
        "",
        f"{'saved and reloaded, difference':<34}{difference:>26.1e}",
        f"{'total time':<34}{total:>24.0f} s",
    ]
    return "\n".join(lines)
