"""Calls of the selection that its tests share."""

import torch

from adaptive_longformer.selection.options import SelectionOptions

SMALL = SelectionOptions(num_blocks=3, block_size=16, query_block_size=16)


def random_keys(length, *, batch=2, heads=2, head_dim=8, coherent=True, seed=0):
    """Queries and keys; coherent ones drift slowly, as those of a text do."""
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, batch, heads, length, head_dim, generator=generator).double()
    if coherent:
        topic = torch.randn(batch, heads, -(-length // 32), head_dim, generator=generator)
        key = key * 0.5 + topic.double().repeat_interleave(32, dim=2)[:, :, :length] * 2
    return query, key


def chosen(selected, batch=0, head=0, row=0):
    count = selected.counts[batch, head, row]
    return selected.key_blocks[batch, head, row, :count].tolist()


def masks_of(kind, batch, length):
    mask, is_global = None, None
    if kind in ("right", "holes", "both"):
        mask = torch.ones(batch, length, dtype=torch.bool)
        mask[-1, length - length // 3 :] = False
        if kind != "right":
            mask[0, length // 2 : length // 2 + 20] = False
    if kind in ("global", "both"):
        is_global = torch.zeros(batch, length, dtype=torch.bool)
        is_global[:, 0] = True
        is_global[0, 40:60] = True
    return mask, is_global
