// The dtypes that parameters may have, a line each, and conversions of one element to the
// arithmetic and back, on the device and on the host. cpu/narrow_loop.h converts many at a time
// where the compiler would not.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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
#include <torch/headeronly/util/Half.h>

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

RBWA_INLINE float widen(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(Float16 x) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits); }
RBWA_INLINE void narrow(float x, Bfloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}
inline void narrow(float x, Float16& to) {
  to.bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(x);
}
#endif

RBWA_INLINE float widen(float x) { return x; }
RBWA_INLINE double widen(double x) { return x; }
RBWA_INLINE void narrow(float x, float& to) { to = x; }
RBWA_INLINE void narrow(double x, double& to) { to = x; }

// Name, storage, and how DLPack (kind and bits) and torch call it; rbwa_fused/streams.py has the
// same list in the same order.
// clang-format off: a line each
#define RBWA_DTYPES(dtype)                             \
  dtype(kFloat32, float, kDLFloat, 32, Float)          \
  dtype(kFloat64, double, kDLFloat, 64, Double)        \
  dtype(kBfloat16, Bfloat16, kDLBfloat, 16, BFloat16)  \
  dtype(kFloat16, Float16, kDLFloat, 16, Half)
// clang-format on

#define RBWA_NAME(name, ...) name,
enum class Dtype : int32_t { RBWA_DTYPES(RBWA_NAME) };
#undef RBWA_NAME

// The arithmetic of a storage type: float, or double for double.
template <typename S>
struct Arithmetic {
  using type = std::conditional_t<std::is_same_v<S, double>, double, float>;
};

// Storage that is narrower than its arithmetic. Its parameters may have float32 masters and
// averages.
template <typename S>
constexpr bool kNarrow = !std::is_same_v<S, typename Arithmetic<S>::type>;
constexpr bool is_narrow(Dtype dtype) {
  return dtype != Dtype::kFloat32 && dtype != Dtype::kFloat64;
}
