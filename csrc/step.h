// The tables that describe one step, and the launchers that take them. No torch, no CUDA header.
#pragma once

#include <cstdint>

enum class Dtype : int32_t { kFloat32, kFloat64, kBfloat16, kFloat16 };

// One parameter tensor. A null pointer is a stream that this segment lacks. A 16-bit parameter may
// have a float32 master: `theta` is the master then, and `param` what it is rounded to.
struct Segment {
  void* theta;
  void* param;
  const void* g;
  void* m;
  void* a;
  void* z;
  void* previous;
  int64_t length;  // elements
  int64_t row;     // of the coefficient tables
  int64_t sampling;
  Dtype dtype;        // of the parameter and g
  Dtype theta_dtype;  // of theta, m, z, previous: the same, or float32 for a master
  Dtype a_dtype;
};

// The coefficient tables as engine/rows.py packs them; names as in update.h. A param group has
// rows:
struct Row {
  double s, lambda, mu, c, kappa, alpha, gamma, delta, eta;
};
// and an average has samplings. `sample` says whether it is touched at all, `current` whether it
// starts at the weights before this step, `write_back` whether theta becomes it; `scale` multiplies
// eta: w where the average is theta.
struct Sampling {
  double scale, w, sample, current, write_back;
};
constexpr int64_t kRowColumns = sizeof(Row) / sizeof(double);
constexpr int64_t kSamplingColumns = sizeof(Sampling) / sizeof(double);

// Takes the step for every segment; the tables must have been checked.
void step_cpu(const Segment* segments, int64_t count, const Row* rows, const Sampling* samplings);

// The instruction set the loops run with: "baseline", "avx2" or "avx512". `set` returns false when
// this processor or this build lacks it; the best one is chosen at load.
const char* cpu_capability();
bool set_cpu_capability(const char* name);
