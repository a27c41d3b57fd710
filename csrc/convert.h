// 16-bit storage, on the device and on the host. The CPU kernel has conversions of its own, which
// are compiled for each instruction set (cpu/loop.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "update.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

RBWA_INLINE float widen(Bfloat16 x) { return __bfloat162float(x); }
RBWA_INLINE float widen(Float16 x) { return __half2float(x); }
RBWA_INLINE void narrow(float x, Bfloat16& to) { to = __float2bfloat16_rn(x); }
RBWA_INLINE void narrow(float x, Float16& to) { to = __float2half_rn(x); }
#else
struct Bfloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline float widen(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(Float16 x) { return static_cast<float>(x); }
inline void narrow(float x, Bfloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float x, Float16& to) { to = static_cast<Float16>(x); }
#endif

RBWA_INLINE float widen(float x) { return x; }
RBWA_INLINE double widen(double x) { return x; }
RBWA_INLINE void narrow(float x, float& to) { to = x; }
RBWA_INLINE void narrow(double x, double& to) { to = x; }

// The arithmetic of a storage type.
template <typename S>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
