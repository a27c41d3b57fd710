// The tables that describe one step, and the launchers that take them. No torch, no CUDA header.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "convert.h"
#include "update.h"

// An average beside a segment's first, in a buffer: line (6). All of a segment's averages have one
// dtype.
struct Further {
  void* a;
  int64_t sampling;
  double w;      // the sampling's, where the host counts
  bool current;  // so is this: it starts at the weights before this step
};

// One parameter tensor. A null pointer is a stream that this segment lacks. A 16-bit parameter may
// have a float32 master: `theta` is the master then, and `param` what it is rounded to.
struct Segment {
  void* theta;
  void* param;
  const void* g;
  void* a;
#define RBWA_FIELD(name, when) void* name;
  RBWA_KEPT(RBWA_FIELD)
#undef RBWA_FIELD
  float* step;     // the age, as torch.optim has it in a parameter's state
  int64_t length;  // elements
  int64_t row;     // of the coefficient tables
  int64_t sampling;
  int64_t age;
  Kind kind;          // kSample without a gradient
  Dtype dtype;        // of the parameter and g
  Dtype theta_dtype;  // the same, or float32 for a master
  Dtype kept_dtype;   // of what is kept: as theta, or float32
  Dtype a_dtype;
  int64_t further_count;
  const Further* further;
};

// The coefficient tables as engine/rows.py packs them. A param group has two rows, the usual one
// and behind it that of a parameter's first step with this kind (age 0), which Adam's kinds do not
// read, as their ages say more (Aging):
struct Row {
  double kind;  // what its parameters with a gradient are stepped by
  Numbers<double> numbers;
};
constexpr int64_t kRowsPerGroup = 2;
// and an average has samplings. `sample` says whether it is touched at all, `current` whether it
// starts at the weights before this step, `write_back` whether theta becomes it; `scale` multiplies
// eta: w where the average is theta.
struct Sampling {
  double scale, w, sample, current, write_back;
};
constexpr int64_t kRowColumns = sizeof(Row) / sizeof(double);
constexpr int64_t kSamplingColumns = sizeof(Sampling) / sizeof(double);

inline Kind kind_of(const Row& row) { return static_cast<Kind>(static_cast<int32_t>(row.kind)); }
#define RBWA_COUNT(name) +1
constexpr int32_t kKinds = 0 RBWA_KINDS(RBWA_COUNT);
#undef RBWA_COUNT
inline bool has_kind(const Row& row) {
  return row.kind >= 0 && row.kind < kKinds &&
         row.kind == static_cast<double>(static_cast<int32_t>(row.kind));
}

// A struct of doubles, rounded to the kernel's arithmetic one by one.
template <typename To, typename T, typename From>
inline __attribute__((always_inline)) To rounded(const From& from) {
  constexpr size_t count = sizeof(From) / sizeof(double);
  const auto wide = std::bit_cast<std::array<double, count>>(from);
  std::array<T, count> narrow;
  for (size_t i = 0; i < count; ++i) narrow[i] = static_cast<T>(wide[i]);
  return std::bit_cast<To>(narrow);
}

// Takes the step for every segment; the tables must have been checked.
void step_cpu(const Segment* segments, int64_t count, const Row* rows, const Sampling* samplings);

// The instruction set the loops run with: "baseline", "avx2" or "avx512". `set` returns false when
// this processor or this build lacks it; the best one is chosen at load.
const char* cpu_capability();
bool set_cpu_capability(const char* name);
