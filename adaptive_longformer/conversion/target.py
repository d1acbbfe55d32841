"""The kinds of model of ours that a source can become."""

from dataclasses import dataclass
from typing import Any

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.conversion.tables import TARGET_PREFIX
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForMultipleChoice,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseForTokenClassification,
    AdaptiveSparseModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import (
    AdaptiveSparseForCausalLM,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseSeq2SeqForQuestionAnswering,
    AdaptiveSparseSeq2SeqForSequenceClassification,
    AdaptiveSparseSeq2SeqModel,
)


@dataclass(frozen=True)
class Target:
    """One kind of model of ours: its classes, and where the tensors are that a converter changes.

    Attributes:
        config_class: the configuration, whose `model_type` names the kind.
        classes: head -> class.
        positions_field: the configuration's rows of the position table that can be extended.
        position_embeddings: the name of that table.
        word_embeddings: the name of the word embedding table.
        tied: the names of the tables that `tie_word_embeddings` makes equal to it.
        parts: what the names of a bare base model begin with.
    """

    config_class: type[Any]
    classes: dict[str, type]
    positions_field: str
    position_embeddings: str
    word_embeddings: str
    tied: tuple[str, ...]
    parts: tuple[str, ...]

    def head_of(self, architecture: str) -> str:
        """Return the head of one of our classes.

        Raises:
            ValueError: there is no such class of this kind.
        """
        for head, model_class in self.classes.items():
            if model_class.__name__ == architecture:
                return head
        allowed = ", ".join(model_class.__name__ for model_class in self.classes.values())
        raise ValueError(
            f"source: architecture {architecture!r} cannot be converted; supported are {allowed}"
        )

    def full_name(self, name: str) -> str:
        """Return our name with the prefix of the base model, which a bare base model leaves out."""
        return TARGET_PREFIX + name if name.startswith(self.parts) else name


ENCODER = Target(
    config_class=AdaptiveSparseConfig,
    classes={
        "Model": AdaptiveSparseModel,
        "ForMaskedLM": AdaptiveSparseForMaskedLM,
        "ForCausalLM": AdaptiveSparseForCausalLM,
        "ForSequenceClassification": AdaptiveSparseForSequenceClassification,
        "ForTokenClassification": AdaptiveSparseForTokenClassification,
        "ForQuestionAnswering": AdaptiveSparseForQuestionAnswering,
        "ForMultipleChoice": AdaptiveSparseForMultipleChoice,
    },
    positions_field="max_position_embeddings",
    position_embeddings="model.embeddings.position_embeddings.weight",
    word_embeddings="model.embeddings.word_embeddings.weight",
    tied=("lm_head.decoder.weight",),
    parts=("embeddings.", "layers.", "pooler."),
)

SEQ2SEQ = Target(
    config_class=AdaptiveSparseSeq2SeqConfig,
    classes={
        "Model": AdaptiveSparseSeq2SeqModel,
        "ForConditionalGeneration": AdaptiveSparseForConditionalGeneration,
        "ForQuestionAnswering": AdaptiveSparseSeq2SeqForQuestionAnswering,
        "ForSequenceClassification": AdaptiveSparseSeq2SeqForSequenceClassification,
    },
    positions_field="max_encoder_position_embeddings",
    position_embeddings="model.encoder.embeddings.position_embeddings.weight",
    word_embeddings="model.encoder.embeddings.word_embeddings.weight",
    tied=("model.decoder.embeddings.word_embeddings.weight", "lm_head.weight"),
    parts=("encoder.", "decoder."),
)

TARGETS = {"adaptive_sparse": ENCODER, "adaptive_sparse_seq2seq": SEQ2SEQ}
