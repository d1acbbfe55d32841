"""Sparsity reports, attention maps, plots."""
