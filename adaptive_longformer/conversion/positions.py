"""The position table of a longer model, made from a shorter one by tiling."""

import torch

MAX_POSITIONS = 131072


def tile_positions(table: torch.Tensor, num_rows: int, offset: int) -> torch.Tensor:
    """Return a position table of `num_rows` rows that repeats the rows of a shorter one.

    RoBERTa's table begins with `offset` = pad_token_id + 1 rows that belong to no position: they
    stay where they are, and the rows after them repeat. The first rows are the source's, unchanged.

    Args:
        table: [rows, hidden_size], the source's table.
        num_rows: rows of the result, at least `rows`.
        offset: rows at the start that are not repeated.
    """
    positions = table[offset:]
    missing = num_rows - table.shape[0]
    repeats = -(-missing // positions.shape[0]) if missing > 0 else 0
    return torch.cat([table, *([positions] * repeats)])[:num_rows].contiguous()


def is_tiled(table: torch.Tensor, source_rows: int, offset: int) -> bool:
    """Tell whether everything after the first `source_rows` rows only repeats them."""
    return torch.equal(table, tile_positions(table[:source_rows], table.shape[0], offset))
