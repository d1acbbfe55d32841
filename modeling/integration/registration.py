"""Makes the models known to Transformers' Auto classes, and our attention to other models."""

from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface

from adaptive_longformer.configuration.configuration_adaptive_sparse import AdaptiveSparseConfig
from adaptive_longformer.configuration.configuration_adaptive_sparse_seq2seq import (
    AdaptiveSparseSeq2SeqConfig,
)
from adaptive_longformer.modeling.integration.attention_interface import (
    NAME,
    adaptive_sparse_attention_forward,
    adaptive_sparse_mask,
    remembering_the_choice,
)
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

AUTO_MODELS = {
    AutoModel: AdaptiveSparseModel,
    AutoModelForCausalLM: AdaptiveSparseForCausalLM,
    AutoModelForMaskedLM: AdaptiveSparseForMaskedLM,
    AutoModelForMultipleChoice: AdaptiveSparseForMultipleChoice,
    AutoModelForPreTraining: AdaptiveSparseForMaskedLM,
    AutoModelForQuestionAnswering: AdaptiveSparseForQuestionAnswering,
    AutoModelForSequenceClassification: AdaptiveSparseForSequenceClassification,
    AutoModelForTextEncoding: AdaptiveSparseModel,
    AutoModelForTokenClassification: AdaptiveSparseForTokenClassification,
}

SEQ2SEQ_AUTO_MODELS = {
    AutoModel: AdaptiveSparseSeq2SeqModel,
    AutoModelForPreTraining: AdaptiveSparseForConditionalGeneration,
    AutoModelForQuestionAnswering: AdaptiveSparseSeq2SeqForQuestionAnswering,
    AutoModelForSeq2SeqLM: AdaptiveSparseForConditionalGeneration,
    AutoModelForSequenceClassification: AdaptiveSparseSeq2SeqForSequenceClassification,
}


def register_with_transformers() -> None:
    """Registers configurations, models and attention; again does no harm."""
    for config, auto_models in (
        (AdaptiveSparseConfig, AUTO_MODELS),
        (AdaptiveSparseSeq2SeqConfig, SEQ2SEQ_AUTO_MODELS),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto_model, model in auto_models.items():
            auto_model.register(config, model, exist_ok=True)
            # By these names pipelines and Trainer know what a model does.
            auto_model._model_mapping._model_mapping[config.model_type] = model.__name__
    AttentionInterface.register(NAME, adaptive_sparse_attention_forward)
    choose = PreTrainedModel.get_correct_attn_implementation
    if not hasattr(choose, "__wrapped__"):  # Transformers asks nobody else whether a model can
        PreTrainedModel.get_correct_attn_implementation = remembering_the_choice(choose)
    # Without a mask function of the same name Transformers would drop the padding mask silently.
    AttentionMaskInterface.register(NAME, adaptive_sparse_mask)
