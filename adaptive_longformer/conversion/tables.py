"""Reversible tables of parameter names: which tensor of a source becomes which tensor of ours."""

import re
from collections.abc import Sequence

TARGET_PREFIX = "model."

_PLACEHOLDERS = {"layer": r"\d+", "parameter": "weight|bias"}

# Checkpoints that were converted from TensorFlow still call LayerNorm's parameters so.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


# Names of a layer, for its weight and its bias, or of one of these; a plain string where both
# models have the same name.
Row = tuple[str, str] | str


class Table:
    """An ordered list of rows (source name, target name), read in both directions.

    `{layer}` stands for a layer index and `{parameter}` for `weight` or `bias`. Two rows may lead
    to the same target name when the source stores one tensor under two names; the first one is the
    name that a conversion back writes.

    Args:
        source_prefix: the source's name for its base model, with the dot ("longformer."). A
            checkpoint of the bare base model leaves it out, as ours leaves out "model.".
        body: rows of the base model, without its names.
        heads: rows of what is around it.
    """

    def __init__(self, source_prefix: str, body: Sequence[Row], heads: Sequence[Row]) -> None:
        self.source_prefix = source_prefix
        self.rows = (
            *(_full_names(row, source_prefix, TARGET_PREFIX) for row in body),
            *(_full_names(row) for row in heads),
        )
        self._to_target = [(_compile(source), target) for source, target in self.rows]
        self._to_source = [(_compile(target), source) for source, target in self.rows]

    def to_target(self, name: str) -> str | None:
        """Return our full name of a source tensor, or None if it has no place in our model."""
        name = _current(name)
        found = _first(self._to_target, name)
        return found or _first(self._to_target, self.source_prefix + name)

    def row_of(self, name: str) -> int:
        """Return the number of the row that a source tensor belongs to."""
        name = _current(name)
        for number, (pattern, _) in enumerate(self._to_target):
            if pattern.fullmatch(name) or pattern.fullmatch(self.source_prefix + name):
                return number
        raise KeyError(name)

    def to_source(self, name: str) -> str | None:
        """Return the source's full name of one of our tensors, or None if it has none."""
        return _first(self._to_source, name) or _first(self._to_source, TARGET_PREFIX + name)

    def to_sources(self, name: str) -> list[str]:
        """Return all the names that the source may have for one of our tensors, full name given."""
        return _all(self._to_source, name)


# The encoder that BERT introduced and the other families kept; the pooler's name differs.
BERT_BODY: tuple[Row, ...] = (
    ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
    ("embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight"),
    ("embeddings.token_type_embeddings.weight", "embeddings.token_type_embeddings.weight"),
    ("embeddings.LayerNorm", "embeddings.layer_norm"),
    ("encoder.layer.{layer}.attention.self.query", "layers.{layer}.attention.query"),
    ("encoder.layer.{layer}.attention.self.key", "layers.{layer}.attention.key"),
    ("encoder.layer.{layer}.attention.self.value", "layers.{layer}.attention.value"),
    ("encoder.layer.{layer}.attention.output.dense", "layers.{layer}.attention.output"),
    ("encoder.layer.{layer}.attention.output.LayerNorm", "layers.{layer}.attention_layer_norm"),
    ("encoder.layer.{layer}.intermediate.dense", "layers.{layer}.intermediate"),
    ("encoder.layer.{layer}.output.dense", "layers.{layer}.output"),
    ("encoder.layer.{layer}.output.LayerNorm", "layers.{layer}.output_layer_norm"),
)

# The language modelling head that BERT introduced and BigBird kept.
BERT_LM_HEAD: tuple[Row, ...] = (
    ("cls.predictions.transform.dense", "lm_head.dense"),
    ("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    ("cls.predictions.bias", "lm_head.decoder.bias"),
    ("cls.predictions.decoder", "lm_head.decoder"),
)

# The task heads that RoBERTa introduced and Longformer kept.
ROBERTA_HEADS: tuple[Row, ...] = (
    "lm_head.dense",
    "lm_head.layer_norm",
    ("lm_head.bias", "lm_head.decoder.bias"),
    "lm_head.decoder",
    "classifier.dense",
    "classifier.out_proj",
    "classifier",
    "qa_outputs",
)

# The encoder-decoder that BART introduced. What is left to the family is the encoder's attention,
# and where the embeddings' (or the last) LayerNorm belongs.
BART_BODY: tuple[Row, ...] = (
    # A checkpoint may hold its shared table under all the names it is used by.
    ("shared.weight", "encoder.embeddings.word_embeddings.weight"),
    ("encoder.embed_tokens.weight", "encoder.embeddings.word_embeddings.weight"),
    ("decoder.embed_tokens.weight", "decoder.embeddings.word_embeddings.weight"),
    *(
        (f"{part}.{source}", f"{part}.{target}")
        for part in ("encoder", "decoder")
        for source, target in (
            ("embed_positions.weight", "embeddings.position_embeddings.weight"),
            ("layers.{layer}.fc1", "layers.{layer}.intermediate"),
            ("layers.{layer}.fc2", "layers.{layer}.output"),
            ("layers.{layer}.final_layer_norm", "layers.{layer}.output_layer_norm"),
        )
    ),
    ("encoder.layers.{layer}.self_attn_layer_norm", "encoder.layers.{layer}.attention_layer_norm"),
    *(
        (f"decoder.layers.{{layer}}.{source}{end}", f"decoder.layers.{{layer}}.{target}{our_end}")
        for source, target in (("self_attn", "self_attention"), ("encoder_attn", "cross_attention"))
        for end, our_end in (
            (".q_proj", ".query"),
            (".k_proj", ".key"),
            (".v_proj", ".value"),
            (".out_proj", ".output"),
            ("_layer_norm", "_layer_norm"),
        )
    ),
)
BART_HEADS: tuple[Row, ...] = ("lm_head.weight", "final_logits_bias", "qa_outputs")


def _full_names(row: Row, source_prefix: str = "", target_prefix: str = "") -> tuple[str, str]:
    source, target = (row, row) if isinstance(row, str) else row
    end = "" if target.endswith(("weight", "bias")) else ".{parameter}"
    return source_prefix + source + end, target_prefix + target + end


def _current(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _compile(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern)
    for name, values in _PLACEHOLDERS.items():
        expression = expression.replace(re.escape("{" + name + "}"), f"(?P<{name}>{values})")
    return re.compile(expression)


def _first(rows: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    return next(iter(_all(rows, name)), None)


def _all(rows: list[tuple[re.Pattern[str], str]], name: str) -> list[str]:
    matches = ((pattern.fullmatch(name), replacement) for pattern, replacement in rows)
    return [replacement.format(**match.groupdict()) for match, replacement in matches if match]
