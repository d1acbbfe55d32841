// The C interface of csrc/cuda/launch.cu, run by the emulator on tensors of the CPU: all thread blocks one after the other.
#include "launch.cuh"

namespace {

struct Start {
  template <typename Kernel>
  int operator()(Kernel kernel, const adaptive::Launch& launch, const adaptive::Arguments& arguments) const {
    using namespace adaptive;
    using emulator::block, emulator::run_block;
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

}  // namespace

extern "C" {

int adaptive_cuda_launch(const adaptive::Launch* launch, const adaptive::Arguments* arguments, void*) {
  return adaptive::by_type_and_head_dim(*arguments, [&](auto type, auto head_dim) {
    return adaptive::launch_by_query_block<type.value, head_dim.value>(*launch, *arguments, Start());
  });
}

int adaptive_cuda_arguments_size() { return (int)sizeof(adaptive::Arguments); }

const char* adaptive_cuda_error(int error) {
  return error < 0 ? adaptive::launch_error(error) : adaptive::emulator::block().error;
}

void adaptive_emulator_seed(unsigned long long seed) { adaptive::emulator::block().random = seed * 2 + 1; }
}
