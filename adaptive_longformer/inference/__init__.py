"""Ready-made uses of trained models, where Transformers has no pipeline for them."""

from adaptive_longformer.inference.question_answering import Answer, answer_question
from adaptive_longformer.inference.summarization import Summary, summarize

__all__ = ["Answer", "Summary", "answer_question", "summarize"]
