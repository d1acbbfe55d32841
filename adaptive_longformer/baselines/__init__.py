"""Attention and selections that ours is compared with."""
