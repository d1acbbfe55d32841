"""Long-document Transformers with adaptive sparse attention.

Importing the package makes its models known to Transformers' Auto classes, and its attention to
other models as `attn_implementation="adaptive_sparse"`.
"""

from adaptive_longformer.analysis.sparsity import sparsity_report
from adaptive_longformer.attention.functional import explain_backends, sparse_attention
from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.conversion.convert import convert_checkpoint
from adaptive_longformer.modeling.integration.registration import register_with_transformers
from adaptive_longformer.modeling.modeling_adaptive_sparse import (
    AdaptiveSparseForMaskedLM,
    AdaptiveSparseForMultipleChoice,
    AdaptiveSparseForQuestionAnswering,
    AdaptiveSparseForSequenceClassification,
    AdaptiveSparseForTokenClassification,
    AdaptiveSparseModel,
    AdaptiveSparsePreTrainedModel,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_causal import (
    AdaptiveSparseForCausalLM,
)
from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
    AdaptiveSparseSeq2SeqForQuestionAnswering,
    AdaptiveSparseSeq2SeqForSequenceClassification,
    AdaptiveSparseSeq2SeqModel,
    AdaptiveSparseSeq2SeqPreTrainedModel,
)

__version__ = "0.1.0"

register_with_transformers()

__all__ = [
    "AdaptiveSparseConfig",
    "AdaptiveSparseForCausalLM",
    "AdaptiveSparseForConditionalGeneration",
    "AdaptiveSparseForMaskedLM",
    "AdaptiveSparseForMultipleChoice",
    "AdaptiveSparseForQuestionAnswering",
    "AdaptiveSparseForSequenceClassification",
    "AdaptiveSparseForTokenClassification",
    "AdaptiveSparseModel",
    "AdaptiveSparsePreTrainedModel",
    "AdaptiveSparseSeq2SeqConfig",
    "AdaptiveSparseSeq2SeqForQuestionAnswering",
    "AdaptiveSparseSeq2SeqForSequenceClassification",
    "AdaptiveSparseSeq2SeqModel",
    "AdaptiveSparseSeq2SeqPreTrainedModel",
    "convert_checkpoint",
    "explain_backends",
    "sparse_attention",
    "sparsity_report",
]
