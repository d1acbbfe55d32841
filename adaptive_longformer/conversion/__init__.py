"""Conversion of checkpoints, one table per source family."""

from adaptive_longformer.conversion.convert import ConversionReport, convert_checkpoint

__all__ = ["ConversionReport", "convert_checkpoint"]
