"""The exact stage of the selection in C++, where the CPU library can be used."""

import ctypes

import torch

from adaptive_longformer.attention.backends.choose import cpp_is_automatic
from adaptive_longformer.attention.kernels.kernel_call import RowTensor, fields
from adaptive_longformer.attention.kernels.load import kernel_library
from adaptive_longformer.selection.exact_call import ExactCall, ExactChoice, empty_choice

_ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OUT_OF_MEMORY = 1
# Further than any token is.
_FAR = 2**40


class _SelectArguments(ctypes.Structure):
    """`SelectArguments` of csrc/cpu/select.cpp, field by field."""

    _fields_ = [
        *fields(ctypes.c_int64, "batch heads key_heads query_length length head_dim element_type"),
        *fields(ctypes.c_int64, "uses_bytes query_block_size block_size tokens_per_key num_keys"),
        *fields(ctypes.c_int64, "num_selected num_rows first_row is_causal left right"),
        *fields(ctypes.c_double, "scale"),
        *fields(ctypes.c_int64, "num_threads"),
        *fields(RowTensor, "query key"),
        *fields(ctypes.c_void_p, "is_voter counts_of_keys ends global_positions global_keys"),
        *fields(ctypes.c_int64, "num_global"),
        *fields(ctypes.c_void_p, "places place_counts"),
        *fields(ctypes.c_int64, "max_places blocks_per_place"),
        *fields(ctypes.c_void_p, "log_rest place_weights shared_blocks"),
        *fields(ctypes.c_int64, "num_shared sampling_seed"),
        *fields(ctypes.c_void_p, "key_blocks counts mass covered share log_dropped threshold"),
    ]


def can_select(call: ExactCall) -> bool:
    """Whether `compiled_choice` may take a call: on a CPU whose library "auto" may use."""
    return (
        call.query.device.type == "cpu"
        and call.query.dtype in _ELEMENT_TYPES
        and cpp_is_automatic()
    )


def compiled_choice(
    call: ExactCall,
    uses_bytes: bool | None = None,
    with_share: bool = False,
    with_dropped: bool = False,
) -> ExactChoice:
    """The choice.

    Args:
        call: on the CPU, in float32, bfloat16 or float16.
        uses_bytes: whether queries and keys meet as bytes, with a scale per token, instead of
            floats; None: where the processor has an instruction for it.
        with_share, with_dropped: what else to return.

    Raises:
        ValueError: places name what the sequence does not have.
        MemoryError: there is no memory for the keys or for the sums of some query blocks.
    """
    result = empty_choice(call, with_share, with_dropped)
    library = kernel_library("cpu")
    assert library.adaptive_select_arguments_size() == ctypes.sizeof(_SelectArguments)
    if uses_bytes is None:
        uses_bytes = bool(library.adaptive_select_has_bytes())
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.query, call.key))
    arguments = _SelectArguments(
        batch=query.shape[0],
        heads=query.shape[1],
        key_heads=key.shape[1],
        query_length=query.shape[2],
        length=call.length,
        head_dim=key.shape[3],
        element_type=_ELEMENT_TYPES[query.dtype],
        uses_bytes=uses_bytes,
        query_block_size=call.query_block_size,
        block_size=call.block_size,
        tokens_per_key=call.tokens_per_key,
        num_keys=key.shape[2],
        num_selected=call.num_blocks,
        num_rows=call.num_rows,
        first_row=call.first_row,
        is_causal=call.is_causal,
        left=min(call.left, _FAR),
        right=min(call.right, _FAR),
        scale=call.scale,
        num_threads=torch.get_num_threads(),
        sampling_seed=call.sampling_seed,
        query=RowTensor(query.data_ptr(), *query.stride()[:3]),
        key=RowTensor(key.data_ptr(), *key.stride()[:3]),
    )
    # Kept until the call is over, as the struct only points into them.
    arrays = {name: tensor.contiguous() for name, tensor in _read_arrays(call).items()}
    written = ("key_blocks", "counts", "mass", "covered", "threshold")
    arrays |= {name: getattr(result, name) for name in written}
    if with_share:
        arrays["share"] = result.share
    if with_dropped:
        arrays["log_dropped"] = result.log_dropped
    for name, tensor in arrays.items():
        setattr(arguments, name, tensor.data_ptr())
    if call.global_positions is not None:
        arguments.num_global = call.global_positions.shape[1]
    if call.shared_blocks is not None:
        arguments.num_shared = call.shared_blocks.shape[-1]
    if call.places is not None:
        arguments.max_places = call.places.numbers.shape[3]
        arguments.blocks_per_place = call.places.blocks_per_place
    status = library.adaptive_select(ctypes.byref(arguments))
    if status == _OUT_OF_MEMORY:
        raise MemoryError("the selection found no memory for its keys or sums")
    if status != 0:
        raise ValueError("places names a place beyond the end of the sequence")
    return result


def _read_arrays(call: ExactCall) -> dict[str, torch.Tensor]:
    """What the library reads beside queries and keys, by the names of its fields."""
    ends = call.ends
    if ends is None:
        ends = torch.full((call.query.shape[0],), call.length)
    arrays = {"ends": ends.long()}
    if call.voters is not None:
        arrays["is_voter"] = call.voters
    if call.key_counts is not None:
        arrays["counts_of_keys"] = call.key_counts.float()
    if call.global_positions is not None:
        arrays["global_positions"] = call.global_positions.long()
        keys = call.global_positions if call.global_keys is None else call.global_keys
        arrays["global_keys"] = keys.long()
    if call.shared_blocks is not None:
        arrays["shared_blocks"] = call.shared_blocks.int()
    if call.places is not None:
        arrays["places"] = call.places.numbers.int()
        arrays["place_counts"] = call.places.counts.int()
        arrays["log_rest"] = call.places.log_rest.float()
        if call.places.weights is not None:
            arrays["place_weights"] = call.places.weights.float()
    return arrays
