"""The definition of the selection: one query block of one head, token by token."""

import torch

from adaptive_longformer.selection.exact_call import ExactCall


def reference_masses(
    call: ExactCall, batch: int, head: int, row: int
) -> tuple[dict[int, float], float]:
    """What a query block may choose, and what it reads anyway.

    Args:
        call: in any type; computed in float64.
        batch, head, row: of the query block, which is counted from the first of `call.query`.

    Returns:
        The mass of every block that may be chosen, times the weight of its place where that was
        drawn, and the mass of all else.
    """
    length = call.length
    key_head = head // (call.query.shape[1] // call.key.shape[1])
    query, key = call.query[batch, head].double(), call.key[batch, key_head].double()
    is_voter = torch.ones(length, dtype=torch.bool)
    if call.voters is not None:
        is_voter = call.voters[batch]
    counts = torch.ones(call.num_sequence_keys, dtype=torch.float64)
    if call.key_counts is not None:
        counts = call.key_counts[batch].double()
    end = length if call.ends is None or call.is_causal else int(call.ends[batch])

    number = call.first_row + row
    first_query = number * call.query_block_size
    last_query = first_query + call.query_block_size - 1
    if not call.is_causal:
        last_query = min(last_query, end - 1)
    before = length - call.query.shape[2]
    votes_from = first_query - call.query_block_size if call.is_causal else first_query
    voters = [
        token - before
        for token in range(max(votes_from, before), min(votes_from + call.query_block_size, length))
        if is_voter[token]
    ]
    choosable, anyway = {}, []  # keys of blocks, and of all else
    for block in range(-(-end // call.block_size)):
        first_key = block * call.block_size
        last_key = first_key + call.block_size - 1
        if call.is_causal and last_key >= first_query:
            continue
        is_near = first_key >= last_query - call.left
        if not call.is_causal:
            is_near = is_near and min(last_key, end - 1) <= first_query + call.right
        run = range(block * call.keys_per_block, (block + 1) * call.keys_per_block)
        keys = [k for k in run if k < call.num_sequence_keys and counts[k] > 0]
        if not is_near and not _is_candidate(call, batch, head, row, block):
            continue
        if not key[keys].isfinite().all():
            continue
        is_shared = call.shared_blocks is not None and block in call.shared_blocks[batch, head]
        if is_near or is_shared:
            anyway += keys
        else:
            choosable[block] = keys
    limit = first_query if call.is_causal else length
    if call.global_positions is not None:
        positions = call.global_positions[batch]
        keys = positions if call.global_keys is None else call.global_keys[batch]
        counts = torch.cat([counts, torch.ones(len(key) - len(counts)).double()])
        counts[keys[positions < limit]] = 1.0
        anyway += keys[positions < limit].tolist()

    mass, covered = dict.fromkeys(choosable, 0.0), 0.0
    if not query[voters].isfinite().all():
        return mass, covered
    every = anyway + [k for keys in choosable.values() for k in keys]
    scores = call.scale * query[voters] @ key.T + counts.log()  # [voters, keys]
    log_total = scores[:, every].logsumexp(dim=1)
    if call.places is not None and _place_count(call, batch, head, row) >= 0:
        log_total = log_total.logaddexp(call.places.log_rest[batch, head, voters].double())
    share = (scores - log_total[:, None]).exp().sum(dim=0) / max(len(voters), 1)
    for block, keys in choosable.items():
        mass[block] = float(share[keys].sum()) * _place_weight(call, batch, head, row, block)
    covered = float(share[anyway].sum())
    return mass, covered


def _place_count(call: ExactCall, batch: int, head: int, row: int) -> int:
    assert call.places is not None
    return int(call.places.counts[batch, head, row])


def _place_weight(call: ExactCall, batch: int, head: int, row: int, block: int) -> float:
    """What the mass of a block counts, as its place was drawn."""
    if call.places is None or call.places.weights is None:
        return 1.0
    place, count = block // call.places.blocks_per_place, _place_count(call, batch, head, row)
    numbers = call.places.numbers[batch, head, row, : max(count, 0)].tolist()
    weights = call.places.weights[batch, head, row].tolist()
    return weights[numbers.index(place)] if place in numbers else 1.0


def _is_candidate(call: ExactCall, batch: int, head: int, row: int, block: int) -> bool:
    """Whether a coarser stage, if there was one, left a block."""
    places = call.places
    if places is None:
        return True
    place, count = block // places.blocks_per_place, _place_count(call, batch, head, row)
    if count < 0 or place in places.numbers[batch, head, row, :count].tolist():
        return True
    first_query = (call.first_row + row) * call.query_block_size
    if call.is_causal:
        return place == first_query // (call.block_size * places.blocks_per_place)
    # Between the first and the last block that the window covers for the query block.
    end = call.length if call.ends is None else int(call.ends[batch])
    last_query = min(first_query + call.query_block_size, end) - 1
    starts_inside = block * call.block_size >= last_query - call.left
    ends_inside = min((block + 1) * call.block_size, end) - 1 <= first_query + call.right
    return starts_inside and ends_inside
