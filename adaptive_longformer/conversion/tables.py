"""Reversible tables of parameter names: which tensor of a source becomes which tensor of ours."""

import re
from collections.abc import Sequence

TARGET_PREFIX = "model."

_PLACEHOLDERS = {"layer": r"\d+", "parameter": "weight|bias"}

# Checkpoints that were converted from TensorFlow still call LayerNorm's parameters so.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class Table:
    """An ordered list of rows (source name, target name), read in both directions.

    `{layer}` stands for a layer index and `{parameter}` for `weight` or `bias`. Two rows may lead
    to the same target name when the source stores one tensor under two names; the first one is the
    name that a conversion back writes.

    Args:
        source_prefix: the source's name for its base model, with the dot ("longformer."). A
            checkpoint of the bare base model leaves it out, as ours leaves out "model.".
        rows: pairs of full names, base model prefix included.
    """

    def __init__(self, source_prefix: str, rows: Sequence[tuple[str, str]]):
        self.source_prefix = source_prefix
        self.rows = tuple(rows)
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


def bert_encoder(prefix: str, pooler: str = "pooler.dense") -> list[tuple[str, str]]:
    """Return the rows of the encoder that BERT introduced and the other families kept.

    Args:
        prefix: the source's name for its base model, with the dot.
        pooler: its name for the pooler's linear layer.
    """
    layer = prefix + "encoder.layer.{layer}."
    ours = "model.layers.{layer}."
    return [
        (prefix + "embeddings.word_embeddings.weight", "model.embeddings.word_embeddings.weight"),
        (
            prefix + "embeddings.position_embeddings.weight",
            "model.embeddings.position_embeddings.weight",
        ),
        (
            prefix + "embeddings.token_type_embeddings.weight",
            "model.embeddings.token_type_embeddings.weight",
        ),
        (prefix + "embeddings.LayerNorm.{parameter}", "model.embeddings.layer_norm.{parameter}"),
        (layer + "attention.self.query.{parameter}", ours + "attention.query.{parameter}"),
        (layer + "attention.self.key.{parameter}", ours + "attention.key.{parameter}"),
        (layer + "attention.self.value.{parameter}", ours + "attention.value.{parameter}"),
        (layer + "attention.output.dense.{parameter}", ours + "attention.output.{parameter}"),
        (
            layer + "attention.output.LayerNorm.{parameter}",
            ours + "attention_layer_norm.{parameter}",
        ),
        (layer + "intermediate.dense.{parameter}", ours + "intermediate.{parameter}"),
        (layer + "output.dense.{parameter}", ours + "output.{parameter}"),
        (layer + "output.LayerNorm.{parameter}", ours + "output_layer_norm.{parameter}"),
        (prefix + pooler + ".{parameter}", "model.pooler.dense.{parameter}"),
    ]


def bert_lm_head() -> list[tuple[str, str]]:
    """Return the rows of the language modelling head that BERT introduced and BigBird kept."""
    return [
        ("cls.predictions.transform.dense.{parameter}", "lm_head.dense.{parameter}"),
        ("cls.predictions.transform.LayerNorm.{parameter}", "lm_head.layer_norm.{parameter}"),
        ("cls.predictions.bias", "lm_head.decoder.bias"),
        ("cls.predictions.decoder.{parameter}", "lm_head.decoder.{parameter}"),
    ]


def bart_model(prefix: str) -> list[tuple[str, str]]:
    """Return the rows of the encoder-decoder that BART introduced, language head included.

    What is left to the family is the encoder's attention, and where the embeddings' (or the last)
    LayerNorm belongs.
    """
    rows = [
        # A checkpoint may hold its shared table under all the names it is used by.
        (prefix + "shared.weight", "model.encoder.embeddings.word_embeddings.weight"),
        (prefix + "encoder.embed_tokens.weight", "model.encoder.embeddings.word_embeddings.weight"),
        (prefix + "decoder.embed_tokens.weight", "model.decoder.embeddings.word_embeddings.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("final_logits_bias", "final_logits_bias"),
    ]
    for part in ("encoder", "decoder"):
        layer, ours = f"{prefix}{part}.layers.{{layer}}.", f"model.{part}.layers.{{layer}}."
        rows += [
            (
                f"{prefix}{part}.embed_positions.weight",
                f"model.{part}.embeddings.position_embeddings.weight",
            ),
            (layer + "fc1.{parameter}", ours + "intermediate.{parameter}"),
            (layer + "fc2.{parameter}", ours + "output.{parameter}"),
            (layer + "final_layer_norm.{parameter}", ours + "output_layer_norm.{parameter}"),
        ]
    layer, ours = prefix + "encoder.layers.{layer}.", "model.encoder.layers.{layer}."
    rows.append(
        (layer + "self_attn_layer_norm.{parameter}", ours + "attention_layer_norm.{parameter}")
    )
    layer, ours = prefix + "decoder.layers.{layer}.", "model.decoder.layers.{layer}."
    for source, target in (("self_attn", "self_attention"), ("encoder_attn", "cross_attention")):
        rows += [
            (f"{layer}{source}.{projection}.{{parameter}}", f"{ours}{target}.{name}.{{parameter}}")
            for projection, name in (
                ("q_proj", "query"),
                ("k_proj", "key"),
                ("v_proj", "value"),
                ("out_proj", "output"),
            )
        ]
        rows.append(
            (
                f"{layer}{source}_layer_norm.{{parameter}}",
                f"{ours}{target}_layer_norm.{{parameter}}",
            )
        )
    return rows


def roberta_heads() -> list[tuple[str, str]]:
    """Return the rows of the task heads that RoBERTa introduced and Longformer kept."""
    return [
        ("lm_head.dense.{parameter}", "lm_head.dense.{parameter}"),
        ("lm_head.layer_norm.{parameter}", "lm_head.layer_norm.{parameter}"),
        ("lm_head.bias", "lm_head.decoder.bias"),
        ("lm_head.decoder.{parameter}", "lm_head.decoder.{parameter}"),
        ("classifier.dense.{parameter}", "classifier.dense.{parameter}"),
        ("classifier.out_proj.{parameter}", "classifier.out_proj.{parameter}"),
        ("classifier.{parameter}", "classifier.{parameter}"),
        ("qa_outputs.{parameter}", "qa_outputs.{parameter}"),
    ]


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
