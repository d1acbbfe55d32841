"""Which of our operators torch.compile leaves out of the CUDA graphs that it makes by itself (mode
"reduce-overhead").
"""

import torch

# They may look sizes up on the device where nothing limits them, or keep what later calls can use,
# which would be in the memory of the graph. Operators "..._in_graphs" do the same for calls that
# need neither.
OUTSIDE_OF_GRAPHS = (torch.Tag.cudagraph_unsafe,)
