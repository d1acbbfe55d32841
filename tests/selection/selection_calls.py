"""Calls of the selection that its tests share."""

from dataclasses import replace

import pytest
import torch

from adaptive_longformer.attention.kernels.load import kernel_library
from adaptive_longformer.selection.exact import exact_choice, torch_choice
from adaptive_longformer.selection.exact_call import ExactCall
from adaptive_longformer.selection.options import SelectionOptions
from adaptive_longformer.selection.reference import reference_masses

# How far masses may be from the definition: sums of float32, and a rough exponential.
FLOAT, ROUGH = 2e-6, 2e-4
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


def make_call(options, num_blocks=3, batch=2, heads=4, seed=0):
    """A call of the exact stage at random, with what `options` says and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    length, dtype = options["length"], options.get("dtype", torch.float32)
    is_causal, masks = options.get("is_causal", False), options.get("masks", "none")
    head_dim, key_heads = options.get("head_dim", 16), options.get("key_heads", 2)
    query = torch.randn(batch, heads, length, head_dim, generator=generator) * 2
    key = torch.randn(batch, key_heads, length, head_dim, generator=generator)
    valid = torch.ones(batch, length, dtype=torch.bool)
    is_global = torch.zeros(batch, length, dtype=torch.bool)
    if masks in ("right", "both"):
        valid[-1, length - length // 3 :] = False
    if masks in ("holes", "both"):
        valid[0, length // 2 : length // 2 + 20] = False
    if masks in ("global", "both"):
        is_global[:, 0] = True
        is_global[0, 40:60] = True
    is_global &= valid
    members = valid & ~is_global
    slots = torch.arange(length).expand(batch, -1).where(is_global, length).sort(dim=-1).values
    query_block_size, block_size = options.get("sizes", (16, 16))
    left, right = options.get("window", (8, 8))
    shared = None
    if options.get("shared"):
        shared = torch.tensor([1, -1, 3]).expand(batch, heads, -1)
    return ExactCall(
        query.to(dtype),
        key.to(dtype),
        length,
        left,
        0 if is_causal else right,
        num_blocks,
        block_size,
        query_block_size,
        voters=members,
        key_counts=members.float(),
        ends=(valid * torch.arange(1, length + 1)).amax(dim=1),
        global_positions=slots[:, : int(is_global.sum(dim=1).max())],
        is_causal=is_causal,
        scale=head_dim**-0.5,
        shared_blocks=shared,
    )


def stages_of(call, num_candidates):
    """What every stage of a choice is asked, the coarsest first."""
    calls = []

    def keep(call, **options):
        calls.append(call)
        return torch_choice(call, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptive_longformer.selection.exact.can_select", lambda call: False)
        patch.setattr("adaptive_longformer.selection.exact.torch_choice", keep)
        exact_choice(call, num_candidates)
    return calls


def as_bytes(call):
    """The call with queries and keys that are bytes times a scale: rounding changes nothing."""

    def rounded(tensor, limit):
        size = tensor.float().abs().amax(dim=-1, keepdim=True)
        factor = (limit / size).nan_to_num(posinf=0.0)
        return (tensor.float() * factor).round() * (size / limit)

    most = kernel_library("cpu").adaptive_select_has_bytes() or 127
    return replace(call, query=rounded(call.query, 127), key=rounded(call.key, most))


def compare(call, choice, kind, tolerance=FLOAT):
    """With the definition: all masses, and that no better block was left."""
    tolerance = ROUGH if kind == "bytes" else tolerance
    call = as_bytes(call) if kind == "bytes" else call
    for batch in range(call.query.shape[0]):
        for head in range(call.query.shape[1]):
            for row in range(call.num_rows):
                mass, covered = reference_masses(call, batch, head, row)
                at = (batch, head, row)
                share = choice.share[at]
                for block, expected in mass.items():
                    assert float(share[block]) == pytest.approx(expected, abs=tolerance)
                if any(mass.values()):
                    assert float(choice.covered[at]) == pytest.approx(covered, abs=tolerance)
                count = int(choice.counts[at])
                chosen = choice.key_blocks[at][:count].tolist()
                assert len(set(chosen)) == count <= call.num_blocks
                best = sorted(mass, key=lambda block: -mass[block])
                # Of the smallest masses nothing is left in float32.
                num_large, num_open = sum(v > 1e-30 for v in mass.values()), len(mass)
                assert min(call.num_blocks, num_large) <= count <= min(call.num_blocks, num_open)
                for place, block in enumerate(chosen):
                    assert mass[block] == pytest.approx(mass[best[place]], abs=tolerance)
                assert choice.mass[at][:count].tolist() == share[chosen].tolist()
                assert not choice.mass[at][count:].any()
                assert not choice.key_blocks[at][count:].any()
