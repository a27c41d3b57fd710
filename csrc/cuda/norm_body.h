// The CUDA kernels' work for one thread of one block, which runs on the host too (see cuda/body.h).
// A block has a number for each lane in shared memory: threads write theirs, then fold.
#pragma once

#include <cstdint>

#include "convert.h"
#include "cuda/norm_cuda.h"

struct NormChunk {
  const void* g;
  int64_t begin, end;
  int64_t sum;  // its place
};

RBWA_INLINE NormChunk chunk_of(const NormLaunch& launch, int64_t block) {
  const auto* grads = reinterpret_cast<const CudaSummed*>(launch.tables);
  int low = 0;
  for (int high = launch.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (grads[middle].first_block <= block ? low : high) = middle;
  }
  const CudaSummed& grad = grads[low];
  const int64_t chunk = block - grad.first_block;
  const int64_t begin = chunk * kNormChunk;
  const int64_t end = grad.length - begin < kNormChunk ? grad.length : begin + kNormChunk;
  return {grad.g, begin, end, grad.first_sum + chunk};
}

// A whole chunk's loads are all in flight before the first is added.
template <typename S>
RBWA_INLINE double squares_lane(const NormChunk& chunk, int thread) {
  const S* g = static_cast<const S*>(chunk.g);
  constexpr int rows = kNormChunk / kNormLanes;
  double lane = 0;
  if (chunk.end - chunk.begin == kNormChunk) {
    S row[rows];
#pragma unroll
    for (int r = 0; r < rows; ++r) row[r] = g[chunk.begin + r * kNormLanes + thread];
#pragma unroll
    for (int r = 0; r < rows; ++r) lane += squared(widen(row[r]));
    return lane;
  }
  for (int64_t i = chunk.begin + thread; i < chunk.end; i += kNormLanes) {
    lane += squared(widen(g[i]));
  }
  return lane;
}

RBWA_INLINE double sums_lane(const double* sums, int64_t chunks, int thread) {
  double lane = 0;
#pragma unroll 8
  for (int64_t i = thread; i < chunks; i += kNormLanes) lane += sums[i];
  return lane;
}

RBWA_INLINE void fold_lane(double* lanes, int half, int thread) {
  if (thread < half) lanes[thread] += lanes[thread + half];
}
