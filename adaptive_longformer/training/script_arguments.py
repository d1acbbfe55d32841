"""The options that all scripts in `examples/` share; the rest are those of the Trainer."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from accelerate import PartialState
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.gpu import has_bfloat16_gpu


def option(default: Any = MISSING, *, help: str = "", aliases: Sequence[str] = ()) -> Any:
    """A field of a dataclass, as HfArgumentParser makes an option of it."""
    return field(default=default, metadata={"help": help, "aliases": [*aliases]})


@dataclass
class DataArguments:
    """What is trained on what."""

    model: str = option(help="checkpoint folder or hub id")
    data_file: str | None = option(None, help="csv, json, jsonl or parquet file to train on")
    dataset: str | None = option(None, help="or the hub id of a data set")
    eval_file: str | None = option(None, help="to choose the best model and the end by")
    test_file: str | None = option(None, help="to test the chosen model on, once")
    split_seed: int = option(0, help="of what is held out if neither file is given")
    streaming: bool = option(
        False, help="never hold all of --data-file (jsonl, parquet) or --dataset in memory"
    )
    max_length: int = option(4096, help="tokens read per document")
    attention_pattern: str | None = option(
        None, help='as "adaptive", which learns what to read; default: as the model says'
    )

    def __post_init__(self) -> None:
        if (self.data_file is None) == (self.dataset is None):
            raise ValueError("one of --data-file and --dataset is needed")
        AdaptiveSparseConfig(**self.model_options)  # raises for an unknown pattern

    @property
    def model_options(self) -> dict[str, Any]:
        """What changes the model's configuration."""
        pattern = self.attention_pattern
        return {} if pattern is None else {"attention_pattern": pattern}


@dataclass
class _Defaults:
    """Fields of TrainingArguments with defaults for a fine-tuning, and short names."""

    output_dir: str = option("outputs", aliases=["--output"])
    num_train_epochs: float = option(3.0, aliases=["--epochs"])
    per_device_train_batch_size: int = option(8, aliases=["--batch-size"])
    per_device_eval_batch_size: int | None = option(None, help="default: as in training")
    gradient_accumulation_steps: int = option(1, aliases=["--gradient-accumulation"])
    gradient_checkpointing: bool = option(False, help="less memory, a third more time")
    use_cpu: bool = option(False, aliases=["--cpu"], help="leave a GPU alone")
    warmup_steps: float = option(0.1)
    weight_decay: float = option(0.01)
    eval_strategy: str = option("epoch", help="epoch or steps, as save_strategy")
    save_strategy: str = option("epoch", help="epoch or steps")
    save_total_limit: int = option(1)
    load_best_model_at_end: bool = option(True)
    logging_steps: float = option(10)
    report_to: str = option("none", help="tensorboard, wandb, trackio, none and others")
    early_stopping: int | None = option(
        None, help="end after so many evaluations without a better one"
    )
    resume: bool = option(False, help="go on from the last whole checkpoint")

    def __post_init__(self) -> None:
        self.per_device_eval_batch_size = (
            self.per_device_eval_batch_size or self.per_device_train_batch_size
        )
        if not self.gradient_checkpointing:
            self.gradient_checkpointing = None  # type: ignore[assignment]
        if not self.use_cpu and has_bfloat16_gpu():
            self.bf16 = True
        super().__post_init__()  # type: ignore[misc]
        get_reporting_integration_callbacks(self.report_to)  # raises for an unknown name
        missing = set(self.report_to) - set(get_available_reporting_integrations())
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(f"--report-to {names}: not installed, pip install {names}")
        PartialState(cpu=self.use_cpu)


@dataclass
class RunArguments(_Defaults, TrainingArguments):
    """How an encoder is trained."""


@dataclass
class Seq2SeqRunArguments(_Defaults, Seq2SeqTrainingArguments):
    """How an encoder-decoder is trained."""


Data = TypeVar("Data", bound=DataArguments)
Options = TypeVar("Options")
Run = TypeVar("Run", bound=RunArguments | Seq2SeqRunArguments)


def parse_script_arguments(
    data_class: type[Data],
    run_class: type[Run],
    argv: Sequence[str] | None,
    description: str,
    **defaults: Any,
) -> tuple[Data, Run]:
    """Reads a command line; a mistake in it ends the process with one line.

    Args:
        data_class, run_class: whose fields are the options.
        argv: the words behind the script's name; None: those of this process.
        description: what the script does, for `--help`.
        defaults: others than those of the classes.
    """
    usage = "%(prog)s --model MODEL --data-file FILE [options]; --help lists them"
    classes: Any = (data_class, run_class)
    parser = HfArgumentParser(classes, description=description, usage=usage)
    parser.set_defaults(**defaults)
    values = vars(parser.parse_args(argv))
    if values["streaming"]:
        values |= _streaming(parser, values)
    try:
        return _made(data_class, values), _made(run_class, values)
    except (ValueError, ImportError) as error:
        parser.error(str(error))


def _made(of: Callable[..., Options], values: dict[str, Any]) -> Options:
    names = [field.name for field in fields(of) if field.init]  # type: ignore[arg-type]
    return of(**{name: values[name] for name in names})


def _streaming(parser: HfArgumentParser, values: dict[str, Any]) -> dict[str, Any]:
    """What has to be otherwise where nobody knows how many documents there are."""
    if values["max_steps"] <= 0:
        parser.error("--streaming needs --max-steps: the number of documents is not known")
    if values["data_file"] and not values["eval_file"]:
        parser.error("--streaming needs --eval-file: nothing can be held out of a stream")
    steps = values["eval_steps"] or max(1, values["max_steps"] // 10)
    chosen = {"train_sampling_strategy": "random"}  # group_by_length needs all lengths
    for what in ("eval", "save"):
        if values[f"{what}_strategy"] == "epoch":
            chosen |= {f"{what}_strategy": "steps", f"{what}_steps": steps}
    return chosen
