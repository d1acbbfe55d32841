"""Which of our operators torch.compile leaves out of the CUDA graphs that it makes by itself (mode
"reduce-overhead").
"""

import torch

# They look sizes up on the device where nothing limits them, and keep what later calls can use,
# which would be in the memory of the graph.
OUTSIDE_OF_GRAPHS = (torch.Tag.cudagraph_unsafe,)
