"""Which of our operators torch.compile leaves out of the CUDA graphs that it makes by itself (mode
"reduce-overhead").
"""

import torch

from adaptive_longformer.attention.call import AttentionCall

# They may look sizes up on the device where nothing limits them, or keep what later calls can use,
# which would be in the memory of the graph. Operators "..._in_graphs" do the same for calls that
# need neither.
OUTSIDE_OF_GRAPHS = (torch.Tag.cudagraph_unsafe,)


def fits_graphs(call: AttentionCall) -> bool:
    """Whether our kernels read nothing back from the device for a call, and keep nothing there: its
    lists are its own, not those of a pattern, and the number of its global tokens is known.
    """
    keys = call.global_keys
    return call.layout is not None and (keys is None or keys.positions is not None)
