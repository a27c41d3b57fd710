// The tables that describe one step, and the launchers that take them. No torch, no CUDA header.
#pragma once

#include <cstdint>

enum class Dtype : int32_t { kFloat32, kFloat64, kBfloat16, kFloat16 };

// One parameter tensor. A null pointer is a stream that this segment lacks.
struct Segment {
  void* theta;
  const void* g;
  void* m;
  void* a;
  void* z;
  void* previous;
  int64_t length;  // elements
  int64_t row;     // of the coefficient table
  Dtype dtype;     // of theta, g, m, z, previous
  Dtype a_dtype;
};

// One row of the coefficient table as rules.py packs it; names as in update.h. `sample` says
// whether the average takes this step's weights at all, `write_back` whether theta becomes it.
struct Row {
  double s, lambda, mu, c, kappa, alpha, gamma, delta, eta, w, sample, write_back;
};
constexpr int64_t kRowColumns = sizeof(Row) / sizeof(double);

// Takes the step for every segment; the table must have been checked.
void step_cpu(const Segment* segments, int64_t count, const Row* rows);

// Exchanges the contents of two ranges of memory that do not overlap.
void exchange_cpu(void* a, void* b, int64_t bytes);

// The instruction set the loops run with: "baseline", "avx2" or "avx512". `set` returns false when
// this processor or this build lacks it; the best one is chosen at load.
const char* cpu_capability();
bool set_cpu_capability(const char* name);
