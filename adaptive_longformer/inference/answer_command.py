"""The command `adaptive-longformer answer`."""

import argparse
import sys

from transformers import AutoModelForQuestionAnswering, AutoModelForSeq2SeqLM

from adaptive_longformer.command_inputs import (
    load_model,
    load_tokenizer,
    read_document,
    saved_heads,
    silence_transformers,
)
from adaptive_longformer.inference.question_answering import answer_question
from adaptive_longformer.progress_line import ProgressLine


def run(args: argparse.Namespace) -> int:
    """Print one answer per line: its score, its characters in the text, and the answer."""
    silence_transformers()
    document = read_document(args.file)
    tokenizer = load_tokenizer(args.model)
    is_writing = any(head.endswith("ForConditionalGeneration") for head in saved_heads(args.model))
    model_class = AutoModelForSeq2SeqLM if is_writing else AutoModelForQuestionAnswering
    model = load_model(model_class, args.model, use_gpu=not args.cpu)
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
