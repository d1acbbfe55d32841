"""Source checkpoints in which every tensor is random, inputs for them, and the comparison."""

import functools
import itertools
import os
import tempfile
from pathlib import Path

import torch
import transformers

import adaptive_longformer
from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.testing import randomize_all_parameters

FULL_GRID = os.environ.get("ADAPTIVE_LONGFORMER_FULL_GRID") == "1"
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
# Heads whose every output belongs to one token.
TOKEN_HEADS = ("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")
FAMILIES = {
    "longformer": "Longformer",
    "roberta": "Roberta",
    "bert": "Bert",
    "big_bird": "BigBird",
}
TOLERANCE = 1e-5

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def source_config(family, **fields):
    """The configuration of a small source."""
    common = dict(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        layer_norm_eps=1e-5,
        type_vocab_size=2,
    )
    if family == "longformer":
        common.update(
            pad_token_id=1,
            sep_token_id=2,
            attention_window=64,
            max_position_embeddings=4098,
        )
    elif family == "roberta":
        common.update(pad_token_id=1, max_position_embeddings=514)
    elif family == "big_bird":
        # Inputs of up to 112 tokens are read in full.
        common.update(pad_token_id=0, sep_token_id=3, max_position_embeddings=512)
        common.update(block_size=16, num_random_blocks=1)
    else:
        common.update(pad_token_id=0, max_position_embeddings=512)
    common.update(fields)
    return getattr(transformers, FAMILIES[family] + "Config")(**common)


def randomize(model):
    """Make every parameter random so that no part of the model is without effect.

    The feed-forward biases are random around -2, where gelu and its tanh approximation differ most
    relative to their value: elsewhere a wrong activation hides behind a small difference.
    """
    randomize_all_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("intermediate.dense.bias"):
                parameter.sub_(2)
    return model


def source_model(family, head, **fields):
    """A small source model in which every tensor is random."""
    model_class = getattr(transformers, FAMILIES[family] + head)
    if head in ("ForSequenceClassification", "ForTokenClassification"):
        fields.setdefault("num_labels", 3)
    return randomize(model_class(source_config(family, **fields))).eval()


def write_source(folder, family, head, **fields):
    """Write a small source checkpoint; returns the folder."""
    source_model(family, head, **fields).save_pretrained(folder)
    return Path(folder)


def load_converted(folder, head, **fields):
    """Load a converted checkpoint with the class of a head, with some fields changed."""
    model_class = getattr(adaptive_longformer, "AdaptiveSparse" + head)
    return model_class.from_pretrained(folder, **fields).eval()


@functools.lru_cache(maxsize=8)
def _models(family, head, fields, options):
    with tempfile.TemporaryDirectory() as folder:
        lists = {name: list(value) for name, value in fields if isinstance(value, tuple)}
        source = source_model(family, head, **{**dict(fields), **lists})
        source.save_pretrained(f"{folder}/source")
        convert_checkpoint(f"{folder}/source", f"{folder}/target", **dict(options))
        return source, load_converted(f"{folder}/target", head)


def models(family, head, options=(), **fields):
    """A source model and its conversion; lists are given as tuples, and pairs are kept."""
    return _models(family, head, tuple(sorted(fields.items())), tuple(options))


def make_inputs(config, head, length, padding="none", global_tokens="default", seed=0):
    """Random inputs of a head: two documents, the second one padded.

    Args:
        padding: "none", "left" or "right".
        global_tokens: "default" (no mask), "none" (a mask of zeros) or "some" (random, some of them
            on padding).
    """
    generator = torch.Generator().manual_seed(1000 * seed + length)
    input_ids = torch.randint(5, config.vocab_size, (2, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    num_padded = length // 3 if padding != "none" else 0
    if num_padded:
        padded = slice(0, num_padded) if padding == "left" else slice(length - num_padded, length)
        input_ids[1, padded] = config.pad_token_id
        attention_mask[1, padded] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs["token_type_ids"] = torch.randint(2, (2, length), generator=generator)
    if config.model_type == "longformer":
        asks_for_separators = head in ("ForQuestionAnswering", "ForMultipleChoice")
        if asks_for_separators and global_tokens == "default":
            # question </s></s> text </s>, in both rows; too short for that: no global tokens.
            # What is global is short, as the source is slow with many global tokens.
            if length - num_padded < 6:
                global_tokens = "none"
            else:
                starts = (0, num_padded if padding == "left" else 0)
                ends = (length, length if padding == "left" else length - num_padded)
                for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
                    first = start + 2 if head == "ForQuestionAnswering" else end - 4
                    input_ids[row, [first, first + 1, end - 1]] = config.sep_token_id
        if global_tokens == "none":
            inputs["global_attention_mask"] = torch.zeros_like(input_ids)
        elif global_tokens == "some":
            mask = torch.rand(input_ids.shape, generator=generator) < min(0.5, 6 / length)
            mask[0, length // 2] = True
            inputs["global_attention_mask"] = mask.long()
    if config.model_type == "big_bird" and head == "ForQuestionAnswering":
        # question <sep> text, and the model is to find the question's token types.
        for row, length_of_question in enumerate((9, 4)):
            input_ids[row, min(length_of_question, length - num_padded) - 1] = config.sep_token_id
        if global_tokens == "default":
            del inputs["token_type_ids"]
    if head == "ForMultipleChoice":
        inputs = {name: tensor.unsqueeze(0) for name, tensor in inputs.items()}
    return inputs


def outputs_of(model, inputs, valid_only=False):
    """What a head puts out; with `valid_only`, only what belongs to tokens that are not padding.

    Logits that BigBird's question answering rules out by taking 1e6 off become -1.
    """
    if model.config.model_type == "big_bird":
        # After a short input the source would stay dense.
        model.base_model.set_attention_type(model.config.attention_type)
    output = model(**inputs)
    names = ["logits", "start_logits", "end_logits", "last_hidden_state"]
    if not valid_only:
        names.append("pooler_output")
    found = [output[name] for name in names if output.get(name) is not None]
    if "start_logits" in output:
        found = [tensor.masked_fill(tensor < -5e5, -1.0) for tensor in found]
    if valid_only:
        found = [tensor[inputs["attention_mask"] == 1] for tensor in found]
    return found


def in_tolerances(expected, found):
    """The largest difference in units of 1e-5 * max(1, max|expected|)."""
    largest = max(tensor.abs().max().item() for tensor in expected)
    difference = max(
        (one - other).abs().max().item() for one, other in zip(expected, found, strict=True)
    )
    assert difference == difference, "NaN in the outputs"
    return difference / (TOLERANCE * max(1.0, largest))


def compare(source, converted, inputs, converted_inputs=None, valid_only=False):
    """Run two models and return how far apart their outputs are, in tolerances."""
    with torch.no_grad():
        expected = outputs_of(source, inputs, valid_only)
        found = outputs_of(converted, converted_inputs or inputs, valid_only)
    return in_tolerances(expected, found)


def grid(**options):
    """All combinations if the full grid is asked for, else enough of them to meet every pair."""
    names, values = list(options), list(options.values())
    combinations = list(itertools.product(*values))
    if FULL_GRID:
        return combinations
    pairs = list(itertools.combinations(range(len(names)), 2))
    missing = {(i, j, c[i], c[j]) for c in combinations for i, j in pairs}
    chosen = []
    while missing:
        best = max(combinations, key=lambda c: sum((i, j, c[i], c[j]) in missing for i, j in pairs))
        chosen.append(best)
        missing -= {(i, j, best[i], best[j]) for i, j in pairs}
    return chosen
