"""The vote of the selection in C++, where the CPU library can be used."""

import ctypes

import torch

from adaptive_longformer.attention.backends.choose import cpp_is_automatic
from adaptive_longformer.attention.kernels.kernel_call import fields
from adaptive_longformer.attention.kernels.load import kernel_library


class _VoteArguments(ctypes.Structure):
    """`VoteArguments` of csrc/cpu/vote.cpp, field by field."""

    _fields_ = [
        *fields(ctypes.c_int64, "heads rows votes candidates fan_out bias_head_stride num_threads"),
        *fields(ctypes.c_void_p, "scores bias log_covered log_dropped voter_weight"),
        *fields(ctypes.c_void_p, "share covered peak others"),
    ]


def can_vote(scores: torch.Tensor) -> bool:
    """Whether C++ may vote: float32 scores on a CPU whose library "auto" may use."""
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and cpp_is_automatic()


def compiled_vote(
    scores: torch.Tensor,
    bias: torch.Tensor,
    log_covered: torch.Tensor,
    log_dropped: torch.Tensor,
    voter_weight: torch.Tensor,
    fan_out: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`vote` for contiguous float32 scores on a CPU, which become the children's weights.

    Returns:
        The candidates' share [heads, rows, candidates], that of what is covered [heads, rows], and
        the peak and the sum of all weights that are not covered, [heads, rows, sub_queries].

    Raises:
        MemoryError: a thread found no memory for one row of sums.
    """
    heads, rows, votes, columns = scores.shape
    assert scores.is_contiguous()
    share = scores.new_empty(heads, rows, columns // fan_out)
    covered = scores.new_empty(heads, rows)
    peak, others = (scores.new_empty(heads, rows, votes) for _ in range(2))
    read = [t.contiguous() for t in (bias, log_covered, log_dropped, voter_weight)]
    arguments = _VoteArguments(
        heads, rows, votes, columns // fan_out, fan_out, rows if bias.shape[0] > 1 else 0,
        torch.get_num_threads(), scores.data_ptr(), *(tensor.data_ptr() for tensor in read),
        share.data_ptr(), covered.data_ptr(), peak.data_ptr(), others.data_ptr(),
    )  # fmt: skip
    library = kernel_library("cpu")
    assert library.adaptive_vote_arguments_size() == ctypes.sizeof(_VoteArguments)
    if library.adaptive_vote(ctypes.byref(arguments)) != 0:
        raise MemoryError("the selection found no memory for its sums")
    return share, covered, peak, others
