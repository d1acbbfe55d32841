// NVRTC and the driver as far as this package calls them, with the prototypes of nvrtc.h and cuda.h. The "machine code" is
// the list of the kernels; a launch runs the kernel in the emulator.
#include <cstdio>
#include <map>
#include <sstream>
#include <string>

#include "emulated_launch.h"

namespace {

struct Program {
  std::string source, log, cubin;
  std::map<std::string, std::string> headers, names;
};

// Expressions by name.
typedef std::map<std::string, std::string> Module;

struct Function {
  int kernel, element_type, head_dim, query_block;
  int shared_memory;
};

int num_compilations = 0;

// As CUDA, each thread has a current context or none; here they are numbers.
thread_local void* current_context = nullptr;

// What NVRTC does first: every inclusion must be among the headers it was given, it reads no file.
bool find_inclusions(Program* program, const std::string& text) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::string start = "#include \"";
    if (line.compare(0, start.size(), start) != 0) continue;
    const std::string name = line.substr(start.size(), line.find('"', start.size()) - start.size());
    if (name == "emulator.h") continue;  // not for CUDA
    if (program->headers.count(name) == 0) {
      program->log = "adaptive_longformer.cu(1): catastrophic error: cannot open source file \"" + name + "\"";
      return false;
    }
    const std::string header = program->headers[name];
    program->headers[name] = "";  // #pragma once
    if (!find_inclusions(program, header)) return false;
  }
  return true;
}

}  // namespace

extern "C" {

int fake_compilations() { return num_compilations; }

int nvrtcVersion(int* major, int* minor) {
  *major = 13, *minor = 0;
  return 0;
}

const char* nvrtcGetErrorString(int result) { return result == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }

int nvrtcCreateProgram(Program** program, const char* source, const char*, int num_headers, const char* const* headers,
                       const char* const* include_names) {
  *program = new Program;
  (*program)->source = source;
  for (int i = 0; i < num_headers; i++) (*program)->headers[include_names[i]] = headers[i];
  return 0;
}

int nvrtcAddNameExpression(Program* program, const char* expression) {
  // Names as the compiler would make them contain neither spaces nor angle brackets.
  std::string name = expression;
  for (char& c : name)
    if (c == ' ' || c == '<' || c == '>' || c == ',' || c == ':') c = '_';
  program->names[expression] = name;
  return 0;
}

int nvrtcCompileProgram(Program* program, int num_options, const char* const* options) {
  num_compilations++;
  bool has_architecture = false;
  for (int i = 0; i < num_options; i++) {
    const std::string option = options[i];
    has_architecture |= option == "--gpu-architecture=sm_90";
  }
  if (!has_architecture) return 5;  // NVRTC_ERROR_INVALID_OPTION
  if (!find_inclusions(program, program->source)) return 6;
  for (const auto& name : program->names) program->cubin += name.first + "\n" + name.second + "\n";
  return 0;
}

int nvrtcGetProgramLogSize(Program* program, size_t* size) {
  *size = program->log.size() + 1;
  return 0;
}

int nvrtcGetProgramLog(Program* program, char* log) {
  std::snprintf(log, program->log.size() + 1, "%s", program->log.c_str());
  return 0;
}

// A zero byte inside, as machine code has.
int nvrtcGetCUBINSize(Program* program, size_t* size) {
  *size = program->cubin.size() + 5;
  return 0;
}

int nvrtcGetCUBIN(Program* program, char* cubin) {
  std::memcpy(cubin, "ELF\0", 4);
  std::memcpy(cubin + 4, program->cubin.c_str(), program->cubin.size() + 1);
  return 0;
}

int nvrtcGetLoweredName(Program* program, const char* expression, const char** name) {
  const auto found = program->names.find(expression);
  if (found == program->names.end()) return 10;  // NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID
  *name = found->second.c_str();
  return 0;
}

int nvrtcDestroyProgram(Program** program) {
  delete *program;
  *program = nullptr;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  *text = error == 500 ? "named symbol not found" : error == 1 ? "invalid argument" : "emulated error";
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = current_context;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)(long)(1000 + device);
  return 0;
}

int cuCtxSetCurrent(void* context) {
  current_context = context;
  return 0;
}

int cuModuleGetGlobal_v2(void**, size_t* size, Module*, const char* name) {
  *size = sizeof(adaptive::Arguments);
  return std::strcmp(name, "&arguments_size") == 0 ? 0 : 500;
}

int cuModuleLoadData(Module** module, const void* image) {
  if (current_context == nullptr) return 201;  // CUDA_ERROR_INVALID_CONTEXT
  if (std::memcmp(image, "ELF\0", 4) != 0) return 200;  // CUDA_ERROR_INVALID_IMAGE
  *module = new Module;
  std::istringstream lines((const char*)image + 4);
  for (std::string expression, name; std::getline(lines, expression) && std::getline(lines, name);)
    (**module)[name] = expression;
  return 0;
}

int cuModuleGetFunction(Function** function, Module* module, const char* name) {
  const auto found = module->find(name);
  if (found == module->end()) return 500;  // CUDA_ERROR_NOT_FOUND
  static const char* const kernels[] = {"forward", "row_sums", "grad_keys", "add_parts", "grad_queries"};
  for (int kernel = 0; kernel < 5; kernel++) {
    Function result = {kernel, 0, 0, 0, 48 * 1024};
    const std::string format = std::string("adaptive::") + kernels[kernel] + "_kernel<%d, %d, %d>";
    if (std::sscanf(found->second.c_str(), format.c_str(), &result.element_type, &result.head_dim,
                    &result.query_block) >= 1) {
      *function = new Function(result);
      return 0;
    }
  }
  return 500;
}

int cuFuncSetAttribute(Function* function, int attribute, int value) {
  if (attribute != 8) return 1;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  function->shared_memory = value;
  return 0;
}

int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_memory, void* stream, void** parameters,
                   void** extra) {
  if (current_context == nullptr) return 201;
  if (grid_x == 0 || grid_y == 0 || grid_z == 0 || block_y != 1 || block_z != 1 || stream != nullptr ||
      extra != nullptr || (int)shared_memory > function->shared_memory)
    return 1;  // CUDA_ERROR_INVALID_VALUE
  const auto& arguments = *(const adaptive::Arguments*)parameters[0];
  const bool is_by_type = function->head_dim == 0;
  if (function->element_type != arguments.element_type ||
      (!is_by_type && (function->head_dim != arguments.head_dim || function->query_block != arguments.query_block_size)))
    return 1;
  const adaptive::Launch launch = {function->kernel, (int)grid_x, (int)grid_y, (int)grid_z, (int)block_x,
                                   (int)shared_memory};
  return adaptive::launch_kernel(launch, arguments, adaptive::emulator::Start());
}
}
