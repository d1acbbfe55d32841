"""What fine-tuning needs beside the Trainer: labelled documents, a collator and metrics."""

from adaptive_longformer.training.adaptive_optimizer import adaptive_parameter_groups
from adaptive_longformer.training.calibration import Calibration, calibrate
from adaptive_longformer.training.collator import GlobalAttentionCollator
from adaptive_longformer.training.labelled_documents import (
    load_labelled_documents,
    stratified_split,
)
from adaptive_longformer.training.metrics import classification_metrics
from adaptive_longformer.training.selection_ramp import SelectionRampCallback

__all__ = [
    "Calibration",
    "GlobalAttentionCollator",
    "SelectionRampCallback",
    "adaptive_parameter_groups",
    "calibrate",
    "classification_metrics",
    "load_labelled_documents",
    "stratified_split",
]
