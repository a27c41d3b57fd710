// The sum of squares behind clip_grad_norm_, in one order for every backend and any number of
// threads. No torch, no CUDA header.
//
// Each gradient is read in the order of its memory, in chunks of kNormChunk elements; a chunk is of
// one gradient. Element i of a chunk belongs to lane i % kNormLanes. A lane begins at 0 and adds
// the squares of its elements in their order; then the upper half of the lanes is added to the
// lower one, again and again, until one is left, which is the chunk's sum. The chunks' sums, in the
// gradients' order, are added in the same way: chunk j belongs to lane j % kNormLanes. All of it is
// float64, where the square of a float32 is exact and does not overflow. Mirrors:
// rbwa_fused/engine/norm.py and triton_kernels/norm.py.
#pragma once

#include <cstdint>
#include <vector>

#include "convert.h"

constexpr int64_t kNormChunk = 4096;  // elements
constexpr int kNormLanes = 256;

template <typename T>
RBWA_INLINE double squared(T g) {
  const double wide = static_cast<double>(g);
  return wide * wide;
}

constexpr int64_t norm_chunks(int64_t length) { return (length + kNormChunk - 1) / kNormChunk; }

// A gradient that fills its memory.
struct Summed {
  const void* g;
  int64_t length;  // elements
  Dtype dtype;
};

// Writes the sum of the squares to sums[0], and behind it each chunk's.
void sum_squares_cpu(const std::vector<Summed>& grads, double* sums);

// The loops of `sum_squares_cpu` with the instruction set in use: the sums of a gradient's chunks
// [first, first + count), and the sum of n sums.
void squares_cpu(const Summed& grad, int64_t first, int64_t count, double* sums);
double sums_cpu(const double* sums, int64_t n);
