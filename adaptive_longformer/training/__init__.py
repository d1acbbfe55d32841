"""What fine-tuning needs beside the Trainer: labelled documents, a collator and metrics."""

from adaptive_longformer.training.collator import GlobalAttentionCollator
from adaptive_longformer.training.labelled_documents import (
    load_labelled_documents,
    stratified_split,
)
from adaptive_longformer.training.metrics import classification_metrics

__all__ = [
    "GlobalAttentionCollator",
    "classification_metrics",
    "load_labelled_documents",
    "stratified_split",
]
