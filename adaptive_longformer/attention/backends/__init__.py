"""The ways to compute a call of the attention operator."""
