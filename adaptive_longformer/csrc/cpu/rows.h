// Reading and writing rows of a tensor: float32, or bfloat16 and float16 converted on the way.
#pragma once

#include "arguments.h"
#include "vectors.h"

namespace adaptive {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (value != value) return (uint16_t)(word >> 16) | 0x40;
  return (uint16_t)((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t bits) {
  // The exponent moves over by a multiplication, which gets subnormal numbers right.
  const uint32_t magnitude = (uint32_t)(bits & 0x7FFF) << 13;
  float result;
  std::memcpy(&result, &magnitude, 4);
  result *= 0x1p112f;
  uint32_t word;
  std::memcpy(&word, &result, 4);
  if ((bits & 0x7C00) == 0x7C00) word |= 0x7F800000;
  word |= (uint32_t)(bits & 0x8000) << 16;
  std::memcpy(&result, &word, 4);
  return result;
}

inline uint16_t to_float16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint16_t sign = (uint16_t)((word >> 16) & 0x8000);
  word &= 0x7FFFFFFF;
  if (word > 0x7F800000) return sign | 0x7E00;
  if (word >= 0x477FF000) return sign | 0x7C00;
  if (word < 0x38800000) {
    // Subnormal: adding 0.5 leaves the rounded mantissa in the low bits.
    float magnitude;
    std::memcpy(&magnitude, &word, 4);
    magnitude += 0.5f;
    std::memcpy(&word, &magnitude, 4);
    return sign | (uint16_t)(word - 0x3F000000);
  }
  return sign | (uint16_t)((word - 0x38000000 + 0xFFF + ((word >> 13) & 1)) >> 13);
}

// Where row (batch, head, position) starts, in elements.
inline int64_t row_offset(const RowTensor& tensor, int64_t batch, int64_t head, int64_t position) {
  return batch * tensor.batch_stride + head * tensor.head_stride + position * tensor.row_stride;
}

inline void load_row(float* target, const RowTensor& tensor, int64_t offset, int count, int64_t element_type) {
  const float* source = (const float*)tensor.data + offset;
  const uint16_t* half = (const uint16_t*)tensor.data + offset;
  if (element_type == FLOAT32) {
    std::memcpy(target, source, count * sizeof(float));
  } else if (element_type == BFLOAT16) {
    for (int i = 0; i < count; i++) target[i] = from_bfloat16(half[i]);
  } else {
    for (int i = 0; i < count; i++) target[i] = from_float16(half[i]);
  }
}

inline void store_row(const RowTensor& tensor, int64_t offset, const float* source, int count, float factor,
                      int64_t element_type) {
  float* target = (float*)tensor.data + offset;
  uint16_t* half = (uint16_t*)tensor.data + offset;
  if (element_type == FLOAT32) {
    for (int i = 0; i < count; i++) target[i] = source[i] * factor;
  } else if (element_type == BFLOAT16) {
    for (int i = 0; i < count; i++) half[i] = to_bfloat16(source[i] * factor);
  } else {
    for (int i = 0; i < count; i++) half[i] = to_float16(source[i] * factor);
  }
}

}  // namespace adaptive
