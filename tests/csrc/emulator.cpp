// The C interface of csrc/cuda/launch.cu, run by the emulator on tensors of the CPU.
#include "emulated_launch.h"

extern "C" {

int adaptive_cuda_launch(const adaptive::Launch* launch, const adaptive::Arguments* arguments, void*) {
  return adaptive::launch_kernel(*launch, *arguments, adaptive::emulator::Start());
}

int adaptive_cuda_arguments_size() { return (int)sizeof(adaptive::Arguments); }

const char* adaptive_cuda_error(int error) {
  return error < 0 ? adaptive::launch_error(error) : adaptive::emulator::block().error;
}

void adaptive_emulator_seed(unsigned long long seed) { adaptive::emulator::block().random = seed * 2 + 1; }
}
