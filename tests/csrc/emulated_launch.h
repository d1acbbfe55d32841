// Runs the kernel of a launch on tensors of the CPU, all thread blocks one after the other.
#pragma once

#include "launch.cuh"

namespace adaptive {
namespace emulator {

struct Start {
  template <typename Kernel>
  int operator()(Kernel kernel, const Launch& launch, const Arguments& arguments) const {
    block().error = nullptr;
    gridDim = {(unsigned)launch.grid_x, (unsigned)launch.grid_y, (unsigned)launch.grid_z};
    for (unsigned z = 0; z < gridDim.z; z++)
      for (unsigned y = 0; y < gridDim.y; y++)
        for (unsigned x = 0; x < gridDim.x; x++) {
          blockIdx = {x, y, z};
          run_block(launch.threads, launch.shared_memory, [&] { kernel(arguments); });
        }
    return block().error == nullptr ? 0 : 1;
  }
};

}  // namespace emulator
}  // namespace adaptive
