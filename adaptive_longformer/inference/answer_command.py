"""The command `adaptive-longformer answer`."""

import argparse
import sys
from typing import Any

from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM

from adaptive_longformer.command_inputs import (
    load_model,
    load_tokenizer,
    read_document,
    silence_transformers,
)
from adaptive_longformer.inference.question_answering import answer_question
from adaptive_longformer.progress_line import ProgressLine


def run(args: argparse.Namespace) -> int:
    """Print one answer per line: its score, its characters in the text, and the answer."""
    silence_transformers()
    document = read_document(args.file)
    tokenizer = load_tokenizer(args.model)
    model = load_model(_model_class(args.model), args.model, use_gpu=not args.cpu)
    with ProgressLine() as progress:
        answers = answer_question(
            model,
            tokenizer,
            args.question,
            document,
            num_answers=args.answers,
            max_answer_tokens=args.max_answer_tokens,
            progress=lambda done, total: progress("reading", done, total),
        )
    for answer in answers:
        text = " ".join(answer.text.split())
        sys.stdout.write(f"{answer.score:.3f}\t{answer.start}-{answer.end}\t{text}\n")
    return 0


def _model_class(name: str) -> Any:
    """The class for the head that a checkpoint was saved with."""
    try:
        saved_as = AutoConfig.from_pretrained(name).architectures or []
    except (OSError, ValueError):
        saved_as = []  # as of an adapter; loading says what else is wrong
    is_writing = any(head.endswith("ForConditionalGeneration") for head in saved_as)
    return AutoModelForSeq2SeqLM if is_writing else AutoModelForQuestionAnswering
