// What the PTX instructions of the kernels do, for the functions that ptx.py writes: each is run by every thread, as a
// fiber of the emulator. Layouts of fragments are those of the PTX ISA's section on warp-level matrix instructions, stated
// here a second time: the emulator's are not used.
#pragma once

#include <string>
#include <type_traits>

#include "device.cuh"

namespace adaptive::ptx {

typedef uint8_t Bits8;
typedef uint16_t Bits16;
typedef uint32_t Bits32;
typedef uint64_t Bits64;
typedef int16_t Signed16;
typedef int32_t Signed32;
typedef int64_t Signed64;
typedef void (*Kernel)(const unsigned char*);

constexpr ElementType BF16 = BFLOAT16, F16 = FLOAT16;
// Addresses of shared memory are offsets: no pointer to global memory can be taken for one.
constexpr Bits32 SHARED_START = 1024;

// The bits of a register as a value of the same size; of a larger register, its low bits.
template <typename T, typename Storage>
T value_of(Storage bits) {
  static_assert(sizeof(T) <= sizeof(Storage), "the register is too small");
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Values smaller than their register are extended, by their sign if they have one.
template <typename T, typename Storage>
void write(Storage& target, T value) {
  static_assert(sizeof(T) <= sizeof(Storage), "the register is too small");
  if (sizeof(T) == sizeof(Storage))
    std::memcpy(&target, &value, sizeof(T));
  else
    target = (Storage)value;
}

// Integers wrap.
template <typename T>
using Unsigned = std::make_unsigned_t<T>;
template <typename T> T sum(T a, T b) { return (T)((Unsigned<T>)a + (Unsigned<T>)b); }
inline float sum(float a, float b) { return a + b; }
template <typename T> T difference(T a, T b) { return (T)((Unsigned<T>)a - (Unsigned<T>)b); }
inline float difference(float a, float b) { return a - b; }
template <typename T> T product(T a, T b) { return (T)((Bits64)a * (Bits64)b); }
// The upper half of the product of 16 or 32 bits.
template <typename T> T upper_product(T a, T b) {
  static_assert(sizeof(T) <= 4, "needs a type of twice the size");
  return (T)(std::conditional_t<std::is_signed_v<T>, Signed64, Bits64>(a) * b >> 8 * sizeof(T));
}
template <typename T> T negative(T a) { return (T)(0 - (Unsigned<T>)a); }
inline float negative(float a) { return -a; }
template <typename T> T absolute(T a) { return a < 0 ? negative(a) : a; }
inline float absolute(float a) { return std::fabs(a); }
template <typename T> T complement(T a) { return (T)~a; }
inline bool complement(bool a) { return !a; }
// Of a number and NaN, the number.
template <typename T> T greater(T a, T b) { return a > b ? a : b; }
inline float greater(float a, float b) { return std::fmax(a, b); }
template <typename T> T less(T a, T b) { return a < b ? a : b; }
inline float less(float a, float b) { return std::fmin(a, b); }
// Counts are not taken modulo the width.
template <typename T> T shifted_l(T a, Bits32 count) { return count >= 8 * sizeof(T) ? (T)0 : (T)((Unsigned<T>)a << count); }
template <typename T> T shifted_r(T a, Bits32 count) {
  return count < 8 * sizeof(T) ? (T)(a >> count) : a < 0 ? (T)-1 : (T)0;
}

inline float power_of_two_to_zero(float exponent) {
  const float result = std::exp2(exponent);
  return result < 1.17549435e-38f ? 0.0f : result;
}

inline void fail(const char* error) { emulator::block().error = error; }

// A valid place for what goes to or comes from nowhere.
inline unsigned char* nowhere() {
  alignas(16) static unsigned char bytes[16];
  std::memset(bytes, 0xFF, 16);
  return bytes;
}

inline unsigned char* param_memory(Bits64 address, size_t size) {
  if (address % size != 0) fail("misaligned access to a parameter");
  return (unsigned char*)address;
}

// Where the call's tensors lie: an access to anything else is an error.
struct Range {
  Bits64 first, end;
};
inline std::vector<Range> known_ranges;

inline bool is_known(Bits64 address, size_t size) {
  for (const Range& range : known_ranges)
    if (address >= range.first && address + size <= range.end) return true;
  return false;
}

inline unsigned char* global_memory(Bits64 address, size_t size) {
  if (address % size != 0) return fail("misaligned access to global memory"), nowhere();
  if (!is_known(address, size)) return fail("access outside of the call's tensors"), nowhere();
  return (unsigned char*)address;
}

inline unsigned char* shared_memory(Bits64 address, size_t size) {
  emulator::Block& all = emulator::block();
  const Bits64 offset = address - SHARED_START;
  const Bits64 bytes = all.memory.data() + all.memory.size() - all.shared;
  if (address < SHARED_START || offset + size > bytes) return fail("access outside of shared memory"), nowhere();
  if (offset % size != 0) return fail("misaligned access to shared memory"), nowhere();
  return all.shared + offset;
}

template <typename T>
T loaded(const unsigned char* from, int index) {
  T value;
  std::memcpy(&value, from + index * sizeof(T), sizeof(T));
  return value;
}

template <typename T, typename Value>
void store(unsigned char* to, int index, Value value) {
  const T element = (T)value;
  std::memcpy(to + index * sizeof(T), &element, sizeof(T));
}

// The value of another lane of the warp; all lanes have to take part.
inline Bits32 shuffled(Bits32 value, Bits32 mask, Bits32 clamp, Bits32 members) {
  if (clamp != 31 || members != ~(Bits32)0) fail("a shuffle of a part of a warp");
  static Bits32 values[32][32];  // by warp
  const int warp = emulator::block().current / 32, lane = emulator::lane();
  values[warp][lane] = value;
  emulator::meet();
  const Bits32 result = values[warp][lane ^ mask];
  emulator::meet();
  return result;
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8 and gets, of each matrix,
// two neighbours of row i / 4, or of column i / 4 if they are transposed. The rows of a matrix are read at once: two in the
// same bank of 16 bytes take two turns.
template <bool IS_TRANSPOSED>
void load_matrices(Bits64 address, Bits32& r0, Bits32& r1, Bits32& r2, Bits32& r3) {
  static Bits64 addresses[32][32];  // by warp
  const int warp = emulator::block().current / 32, lane = emulator::lane();
  addresses[warp][lane] = address;
  emulator::meet();
  Bits32* const registers[4] = {&r0, &r1, &r2, &r3};
  for (int matrix = 0; matrix < 4; matrix++) {
    Bits16 elements[8][8];
    int banks = 0;
    for (int row = 0; row < 8; row++) {
      const Bits64 from = addresses[warp][matrix * 8 + row];
      std::memcpy(elements[row], shared_memory(from, 16), 16);
      banks |= 1 << from / 16 % 8;
    }
    if (banks != 0xFF) fail("rows of a matrix lie in the same bank");
    const int i = lane / 4, k = lane % 4 * 2;
    const Bits16 low = IS_TRANSPOSED ? elements[k][i] : elements[i][k];
    const Bits16 high = IS_TRANSPOSED ? elements[k + 1][i] : elements[i][k + 1];
    *registers[matrix] = low | (Bits32)high << 16;
  }
  emulator::meet();
}

// D[16 x 8] = A[16 x 16] B[16 x 8] + D. With g = lane / 4 and t = lane % 4, a lane holds
// of A, in pairs from column 2t on: row g, row g + 8, row g and columns + 8, row g + 8 and columns + 8;
// of B, in pairs from row 2t on: column g, column g and rows + 8;
// of D: row g and columns 2t, 2t + 1, then row g + 8.
template <ElementType TYPE>
void multiply_accumulate(Bits32& d0, Bits32& d1, Bits32& d2, Bits32& d3, Bits32 a0, Bits32 a1, Bits32 a2, Bits32 a3,
                         Bits32 b0, Bits32 b1) {
  struct Operands {
    float a[16][16], b[16][8];
  };
  static Operands all[32];  // by warp
  const int lane = emulator::lane(), g = lane / 4, t = lane % 4;
  Operands& operands = all[emulator::block().current / 32];
  const Bits32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < 4; i++)
      operands.a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = unpack<TYPE>((Half)(a[i] >> 16 * half));
    for (int i = 0; i < 2; i++) operands.b[2 * t + i * 8 + half][g] = unpack<TYPE>((Half)(b[i] >> 16 * half));
  }
  emulator::meet();
  Bits32* const d[4] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; i++) {
    float total = value_of<float>(*d[i]);
    for (int k = 0; k < 16; k++) total += operands.a[g + i / 2 * 8][k] * operands.b[k][2 * t + i % 2];
    write<float>(*d[i], total);
  }
  emulator::meet();
}

// 16 bytes, or zeros if the source is to be skipped.
inline void start_copy(Bits64 target, Bits64 source, bool is_skipped) {
  unsigned char* to = shared_memory(target, 16);
  copy_async(to, is_skipped ? nowhere() : global_memory(source, 16), !is_skipped);
}

// The kernel of a mangled name, or null; written by ptx.py.
Kernel kernel_of(const std::string& name);

}  // namespace adaptive::ptx

extern "C" {

void ptx_know(unsigned long long first, unsigned long long size) {
  adaptive::ptx::known_ranges.push_back({first, first + size});
}
void ptx_forget() { adaptive::ptx::known_ranges.clear(); }
void ptx_seed(unsigned long long seed) { adaptive::emulator::block().random = seed * 2 + 1; }

// Runs all thread blocks, one after the other; gives the last error or null.
const char* ptx_run(const char* name, const int grid[3], int threads, int shared_memory, const void* parameters) {
  using namespace adaptive;
  const ptx::Kernel kernel = ptx::kernel_of(name);
  if (kernel == nullptr) return "no such kernel";
  emulator::block().error = nullptr;
  gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
  for (unsigned z = 0; z < gridDim.z; z++)
    for (unsigned y = 0; y < gridDim.y; y++)
      for (unsigned x = 0; x < gridDim.x; x++) {
        blockIdx = {x, y, z};
        emulator::run_block(threads, shared_memory, [&] { kernel((const unsigned char*)parameters); });
      }
  return emulator::block().error;
}
}
