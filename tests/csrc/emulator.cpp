// The C interface of csrc/cuda/launch.cu, run by the emulator on tensors of the CPU.
#include "launch.cuh"

namespace {

struct EmulatorLaunch {
  template <typename Kernel>
  int operator()(Kernel kernel, int grid_x, int grid_y, int grid_z, int threads, int shared_memory,
                 const adaptive::Arguments& arguments, void*) const {
    using namespace adaptive;
    emulator::block().error = nullptr;
    gridDim = {(unsigned)grid_x, (unsigned)grid_y, (unsigned)grid_z};
    for (unsigned z = 0; z < gridDim.z; z++)
      for (unsigned y = 0; y < gridDim.y; y++)
        for (unsigned x = 0; x < gridDim.x; x++) {
          blockIdx = {x, y, z};
          emulator::run_block(threads, shared_memory, [&] { kernel(arguments); });
        }
    return emulator::block().error == nullptr ? 0 : 1;
  }
};

}  // namespace

extern "C" {

int adaptive_cuda_forward(const adaptive::Arguments* arguments, void* stream) {
  return adaptive::with_instance(adaptive::instance_of(*arguments),
                                 adaptive::RunForward<EmulatorLaunch>{*arguments, EmulatorLaunch(), stream});
}

int adaptive_cuda_backward(const adaptive::Arguments* arguments, void* stream) {
  return adaptive::with_instance(adaptive::instance_of(*arguments),
                                 adaptive::RunBackward<EmulatorLaunch>{*arguments, EmulatorLaunch(), stream});
}

int adaptive_cuda_shared_memory(int head_dim, int query_block) {
  return adaptive::with_instance({adaptive::BFLOAT16, head_dim, query_block}, adaptive::SharedMemory());
}

int adaptive_cuda_arguments_size() { return (int)sizeof(adaptive::Arguments); }

const char* adaptive_cuda_error(int error) {
  return error == 1 ? adaptive::emulator::block().error : "no kernel for these types and sizes";
}

void adaptive_emulator_seed(unsigned long long seed) { adaptive::emulator::block().random = seed * 2 + 1; }
}
