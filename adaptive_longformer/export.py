"""The command `adaptive-longformer export`: an encoder with its head as one graph.

The number of sequences and their length stay open. Attention is computed by the backend
"exportable", which needs room for a fixed number of global tokens.
"""

import argparse
import logging
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import AutoConfig, AutoTokenizer

from adaptive_longformer.command_inputs import load_model, saved_heads, silence_transformers
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.conversion.companions import has_tokenizer
from adaptive_longformer.conversion.staging import check_target, staged_folder
from adaptive_longformer.modeling import modeling_adaptive_sparse as models
from adaptive_longformer.modeling.adaptive_selection import selections
from adaptive_longformer.modeling.default_global_tokens import default_strategy
from adaptive_longformer.progress_line import ProgressLine
from adaptive_longformer.selection.exportable_selection import longest_exportable

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
PATTERNS = ("longformer", "sliding_window", "full", "adaptive")
# Room for global tokens where nobody says how many there are: "first" marks one.
MOST_GLOBAL_TOKENS = 64
TOLERANCE = 1e-4
# Weights of more bytes are in a file beside an ONNX graph, which can hold 2 GB.
_LARGE = 1_500_000_000


def run(args: argparse.Namespace) -> int:
    """Export, check, and print what was done."""
    silence_transformers()
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}[args.format]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(
            f"--format onnx needs {', '.join(missing)}: pip install 'adaptive-longformer[export]'"
        )
    target = check_target(args.target, Path(args.model), args.overwrite)
    with ProgressLine() as progress:
        progress("loading", 0, 1)
        model = _load(args)
        progress("loading", 1, 1)
        with staged_folder(target) as folder:
            file = folder / FILES[args.format]
            progress("exporting", 0, 1)
            inputs = example(model, 2, 80, args.global_attention_mask)
            export(model, inputs, file)
            progress("exporting", 1, 1)
            model.config.to_json_file(folder / "config.json")
            if has_tokenizer(Path(args.model)):
                AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
            progress("checking", 0, 1)
            difference = _checked(model, file, args.global_attention_mask)
            progress("checking", 1, 1)
    size = sum(part.stat().st_size for part in target.glob(f"{file.name}*"))
    lines = [
        f"{args.model} -> {target / file.name} ({size / 1e6:,.1f} MB)",
        f"inputs [batch, length]: {', '.join(inputs)}",
        f"max |difference| from the model, at other sizes: {difference:.3g}",
    ]
    if (longest := _longest(model)) < model.config.max_sequence_length:
        lines.insert(2, f"tokens per sequence, at most, as blocks are selected: {longest}")
    if model.config.uses_global_tokens and model.config.max_global_tokens:
        lines.insert(2, f"global tokens per sequence, at most: {model.config.max_global_tokens}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _load(args: argparse.Namespace) -> Any:
    """The model, as it is to be exported; raises ValueError if it cannot be."""
    config = AutoConfig.from_pretrained(args.model)
    name = next(iter(saved_heads(args.model)), "AdaptiveSparseModel")
    if not isinstance(config, AdaptiveSparseConfig):
        raise ValueError(
            f"MODEL: {args.model} is a {config.model_type} checkpoint; convert it first: "
            f"adaptive-longformer convert {args.model} TARGET"
        )
    if name not in models.__all__ or name == "AdaptiveSparseForMultipleChoice":
        raise ValueError(
            f"MODEL: {args.model} is an {name}, an encoder without a head or with one for "
            "sequences, tokens, answers or masked words is needed"
        )
    if config.attention_pattern not in PATTERNS:
        raise ValueError(
            f"MODEL: its attention_pattern is {config.attention_pattern!r}, one of {PATTERNS} "
            "can be exported"
        )
    if args.max_global_tokens is not None:
        config.max_global_tokens = args.max_global_tokens
        config.validate_adaptive_sparse()
    config.attention_backend = "auto"
    model = load_model(
        getattr(models, name), args.model, use_gpu=False, config=config, dtype=torch.float32
    ).eval()
    if args.window_only and selections(model):
        model.set_selection_strength(0.0)
    elif model.config.selection_sampling:
        raise ValueError(
            "selection_sampling is True, a graph reads the blocks with the largest mass and draws "
            "none: set it to False in the model's config.json, or give --window-only"
        )
    config = model.config
    if config.max_global_tokens is None:
        encoder = model if isinstance(model, models.AdaptiveSparseModel) else model.model
        marked = default_strategy(
            config.default_global_tokens, encoder.head, config.attention_pattern
        )
        is_one = marked == "first" and not args.global_attention_mask
        config.max_global_tokens = 1 if is_one else MOST_GLOBAL_TOKENS
    return model


def _longest(model: Any) -> int:
    """The longest sequence of a graph, in tokens."""
    limits = [longest_exportable(part.options) for part in selections(model) if part.is_active]
    return min([model.config.max_sequence_length, *limits])


class _Graph(nn.Module):
    """A model whose inputs and outputs are tensors by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            global_attention_mask=global_attention_mask,
        )  # fmt: skip
        return {name: tensor for name, tensor in outputs.items() if tensor is not None}


def example(
    model: Any, batch_size: int, length: int, global_attention_mask: bool
) -> dict[str, torch.Tensor]:
    """Random inputs of a graph, int64 [batch, length]; the last sequence has a third of padding."""
    config, generator = model.config, torch.Generator().manual_seed(length)
    length = min(length, config.max_sequence_length)
    shape = (batch_size, length)
    input_ids = torch.randint(config.vocab_size, shape, generator=generator)
    mask = torch.ones_like(input_ids)
    mask[-1, length - length // 3 :] = 0
    if config.sep_token_id is not None:
        input_ids[:, length // 8] = config.sep_token_id
    inputs = {
        "input_ids": input_ids.masked_fill(mask == 0, config.pad_token_id or 0),
        "attention_mask": mask,
    }
    if config.type_vocab_size > 1:
        inputs["token_type_ids"] = (torch.arange(length) > length // 8).long().expand(shape)
    if global_attention_mask:
        inputs["global_attention_mask"] = (torch.arange(length) % 50 == 0).long().expand(shape)
    return {name: tensor.contiguous() for name, tensor in inputs.items()}


def export(model: Any, inputs: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a model as a graph, to ONNX or for `torch.export.load` by the name of the file."""
    sizes = {0: Dim("batch"), 1: Dim("length", max=_longest(model))}
    graph, shapes = _Graph(model).eval(), dict.fromkeys(inputs, sizes)
    with torch.no_grad():  # a graph can only be made of what layers know of their own values
        names = list(graph(**inputs))
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(graph, (), inputs, dynamic_shapes=shapes, strict=False)
            if file.suffix != ".onnx":
                torch.export.save(program, file)
                return
            onnx = torch.onnx.export(
                program, (), kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False,
                output_names=names,
            )  # fmt: skip
            assert onnx is not None
            num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
            onnx.save(file, external_data=num_bytes > _LARGE)
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _checked(model: Any, file: Path, global_attention_mask: bool) -> float:
    """The largest difference between the outputs of a graph and its model in float64, over the
    largest of these where that is above 1; raises ValueError if it is too large.

    In float32 a model may choose blocks by scores in int8.
    """
    run_graph, exact = _runner(file), _Graph(model).double()

    def difference(batch_size: int, length: int) -> float:
        inputs = example(model, batch_size, min(length, _longest(model)), global_attention_mask)
        actual, errors = run_graph(inputs), []
        for name, expected in exact(**inputs).items():
            error = (actual[name] - expected).abs().max() / expected.abs().max().clamp(min=1)
            errors.append(error.nan_to_num(nan=torch.inf))
        return float(torch.stack(errors).max())

    widest = _widest(model.config)
    lengths = [2 * widest + 35]
    if active := [part for part in selections(model) if part.is_active]:
        # A few blocks are not chosen then. Of two with nearly the same mass rounding may choose the
        # other one, so that one of three lengths is enough.
        options = active[0].options
        few = options.num_blocks + 4
        lengths = [widest // 2 + (few + i) * options.block_size + 3 * i for i in range(3)]
    worst = max(difference(1, 9), min(difference(3, length) for length in lengths))
    if not worst <= TOLERANCE:
        raise ValueError(f"the graph differs from the model by {worst:.3g}, nothing was written")
    return worst


def _widest(config: AdaptiveSparseConfig) -> int:
    """The largest window of any layer, in tokens."""
    windows = config.attention_window
    return windows if isinstance(windows, int) else max(windows)


def _runner(file: Path) -> Any:
    """A function of a graph's inputs by name that gives its outputs by name."""
    if file.suffix != ".onnx":
        module = torch.export.load(file).module()
        return lambda inputs: module(**inputs)
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run_session(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, results), strict=True))

    return run_session
