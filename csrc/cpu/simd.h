// Float vectors of the width this file is compiled for. CMake compiles the files of the stages,
// which include it, once per instruction set, each time with another PBS_CPU_ARCH. Everything here
// must be in that namespace. Otherwise the linker could choose an AVX-512 body for a CPU without
// AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#include "pbs/params.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace pbs::cpu::PBS_CPU_ARCH {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using IntVec = int32_t __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec load(const float* src) {
  Vec v;
  std::memcpy(&v, src, sizeof v);
  return v;
}
inline void store(float* dst, Vec v) { std::memcpy(dst, &v, sizeof v); }
inline Vec splat(float x) { return Vec{} + x; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec v) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// 2^x for x <= 0 with a relative error of 2e-9 before rounding. It is exactly 0 below -126, so that
// a masked score (-inf) adds nothing, and NaN for NaN.
inline Vec exp2_nonpositive(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the float.
  const Vec shifted = x + 12582912.0f;
  const Vec f = x - (shifted - 12582912.0f);
  Vec p = splat(1.5345811997656727e-4f);
  p = p * f + 1.33999312191419e-3f;
  p = p * f + 9.618488957130845e-3f;
  p = p * f + 5.5503287769656136e-2f;
  p = p * f + 2.402264689063404e-1f;
  p = p * f + 6.931472057372673e-1f;
  p = p * f + 1.0f;
  const IntVec scaled = reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23);
  const Vec result = reinterpret_cast<Vec>(scaled);
  return x < -126.0f ? Vec{} : (x == x ? result : x);
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // The exponent is re-biased by a multiplication, which also turns subnormals into normals.
  if ((h & 0x7c00u) == 0x7c00u) return from_bits(sign | 0x7f800000u | magnitude);
  return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {  // subnormal: the float adder rounds it
    const float rounded = from_bits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(to_bits(rounded) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void halves_to_floats(const uint16_t* src, float* dst, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(packed));
  }
#endif
  for (; i < n; ++i) dst[i] = half_to_float(src[i]);
}

inline const void* offset(const void* data, int64_t num_elements, DType dtype) {
  return static_cast<const char*>(data) + num_elements * element_size(dtype);
}

// Widens n contiguous elements to float32.
inline void to_floats(const void* src, DType dtype, float* dst, int64_t n) {
  const uint16_t* words = static_cast<const uint16_t*>(src);
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(dst, src, n * sizeof(float));
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) dst[i] = from_bits(static_cast<uint32_t>(words[i]) << 16);
      break;
    case DType::kFloat16:
      halves_to_floats(words, dst, n);
      break;
  }
}

// Rounds n contiguous float32 to the nearest `dtype`, ties to even.
inline void from_floats(const float* src, DType dtype, void* dst, int64_t n) {
  uint16_t* words = static_cast<uint16_t*>(dst);
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(dst, src, n * sizeof(float));
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i) words[i] = float_to_bfloat16(src[i]);
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i) words[i] = float_to_half(src[i]);
      break;
  }
}

// Float rows of a (B, H, N, D) tensor: in place for float32, else converted into `buffer`
// (num_rows, head_dim). Returns the first row and sets *row_stride.
inline const float* float_rows(const ConstRows& rows, const Problem& problem, int64_t b, int64_t h,
                               int64_t first_row, int64_t num_rows, float* buffer,
                               int64_t* row_stride) {
  const int64_t start = b * rows.batch_stride + h * rows.head_stride + first_row * rows.row_stride;
  const void* src = offset(rows.data, start, problem.dtype);
  if (problem.dtype == DType::kFloat32) {
    *row_stride = rows.row_stride;
    return static_cast<const float*>(src);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    to_floats(offset(src, r * rows.row_stride, problem.dtype), problem.dtype,
              buffer + r * problem.head_dim, problem.head_dim);
  }
  *row_stride = problem.head_dim;
  return buffer;
}

}  // namespace pbs::cpu::PBS_CPU_ARCH
