"""The attention of the causal model, and its cache."""
