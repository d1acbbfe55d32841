"""Summaries of long documents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from adaptive_longformer.modeling.modeling_adaptive_sparse_seq2seq import (
    AdaptiveSparseForConditionalGeneration,
)

MAX_NEW_TOKENS = 256
# What is set where neither the caller nor the checkpoint's generation_config says anything.
DEFAULTS = {"num_beams": 4, "no_repeat_ngram_size": 3, "length_penalty": 2.0}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Summary:
    """A summary, and how much of the document it is based on.

    Attributes:
        text: the summary.
        num_tokens_read: tokens of the document that the model read, special tokens included.
        num_tokens: tokens of the whole document.
    """

    text: str
    num_tokens_read: int
    num_tokens: int

    @property
    def is_of_the_whole_document(self) -> bool:
        """Whether nothing was cut off."""
        return self.num_tokens_read == self.num_tokens


def summarize(
    model: AdaptiveSparseForConditionalGeneration,
    tokenizer: Any,
    text: str,
    *,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
    **given: Any,
) -> Summary:
    """Write a summary of one document.

    The first token is global where the model has projections for global tokens but its
    configuration makes none global by default, as in a converted LED: without a global token its
    summaries are poor.

    Args:
        model: an encoder-decoder that was trained to summarise; it is put into evaluation mode for
            the call.
        tokenizer: the model's tokenizer.
        text: the document. What is longer than the model can read is cut off at the end; the result
            says so.
        max_new_tokens: the longest summary, in tokens. None: what the checkpoint's generation
            settings say, or else 256; never more than the decoder can write.
        progress: called with what is being done ("reading", "writing"), how much of it is done, and
            how much there is at most.
        given: options of `model.generate`; what is not given is as the checkpoint's generation
            settings say, or else 4 beams, no repeated three tokens and a length penalty of 2.

    Returns:
        The summary, and how much of the document was read.

    Raises:
        ValueError: the document is empty, the model is of another kind, or an option is out of
            range.
    """
    if not isinstance(model, AdaptiveSparseForConditionalGeneration):
        raise ValueError(
            f"model is a {type(model).__name__}, an AdaptiveSparseForConditionalGeneration is "
            "needed; LED and BigBird-Pegasus checkpoints become one by "
            "adaptive-longformer convert SOURCE TARGET"
        )
    if not isinstance(text, str):
        raise ValueError(f"text is a {type(text).__name__}, one document as a string is needed")
    if not text.strip():
        raise ValueError("text is empty, a document to summarise is needed")
    report_progress = progress or _no_progress
    options = generation_options(model, max_new_tokens, given, DEFAULTS)
    longest = options["max_new_tokens"]

    num_tokens = len(tokenizer(text, verbose=False)["input_ids"])
    capacity = model.config.max_sequence_length
    token_ids = tokenizer(text, truncation=True, max_length=capacity)["input_ids"]
    if set(tokenizer.all_special_ids).issuperset(token_ids):
        raise ValueError("text has no token the tokenizer knows, a document is needed")
    inputs = {"input_ids": torch.tensor([token_ids], device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if model.config.separate_global_projections and model.config.default_global_tokens == "none":
        inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
        inputs["global_attention_mask"][:, 0] = 1

    report_progress("reading", 0, len(token_ids))
    criteria = StoppingCriteriaList([_Report(report_progress, len(token_ids), longest)])
    was_training = model.training
    model.eval()
    try:
        # The protocol that generate() is annotated with fits no model.
        written = cast(Any, model).generate(**inputs, stopping_criteria=criteria, **options)
    finally:
        model.train(was_training)
    report_progress("writing", longest, longest)
    return Summary(
        text=tokenizer.decode(written[0], skip_special_tokens=True).strip(),
        num_tokens_read=len(token_ids),
        num_tokens=num_tokens,
    )


class _Report(StoppingCriteria):
    """Stops nothing, reports every token that is written."""

    def __init__(self, progress: Progress, document_length: int, max_new_tokens: int) -> None:
        self.progress = progress
        self.document_length = document_length
        self.max_new_tokens = max_new_tokens
        self.num_written = 0

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        if self.num_written == 0:
            self.progress("reading", self.document_length, self.document_length)
        self.num_written += 1
        self.progress("writing", min(self.num_written, self.max_new_tokens), self.max_new_tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def generation_options(
    model: AdaptiveSparseForConditionalGeneration,
    max_new_tokens: int | None,
    given: dict[str, Any],
    defaults: dict[str, Any],
    limit: int = MAX_NEW_TOKENS,
) -> dict[str, Any]:
    """The caller's options; by the defaults and the limit where the checkpoint has no settings."""
    settings, plain = model.generation_config, GenerationConfig()

    def is_set(name: str) -> bool:
        return getattr(settings, name, None) not in (None, getattr(plain, name))

    options = {name: value for name, value in defaults.items() if not is_set(name)} | given
    num_beams = options.get("num_beams", settings.num_beams)
    if num_beams == 1 and "length_penalty" not in given:
        options.pop("length_penalty", None)  # it compares the ends of beams
    # The start token takes one place; the last token is not read again and needs none.
    room = model.config.max_decoder_position_embeddings
    if max_new_tokens is None:
        if is_set("max_new_tokens"):
            limit = cast(int, settings.max_new_tokens)
        elif is_set("max_length"):
            limit = cast(int, settings.max_length) - 1
        max_new_tokens = min(limit, room)
    elif not 1 <= max_new_tokens <= room:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, 1 to {room} "
            "(config.max_decoder_position_embeddings) are allowed"
        )
    return {**options, "max_new_tokens": max_new_tokens}


def _no_progress(stage: str, done: int, total: int) -> None:
    pass
