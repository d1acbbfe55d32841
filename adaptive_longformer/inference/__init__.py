"""Whole tasks in one call, from text to text."""

from adaptive_longformer.inference.summarization import Summary, summarize

__all__ = ["Summary", "summarize"]
