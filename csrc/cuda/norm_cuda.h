// One launch of the CUDA sum of squares as the kernel gets it, by value, and the launchers. No
// torch, no CUDA header.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/kernel.h"
#include "norm.h"

static_assert(kNormLanes == kThreads);  // a thread is a lane

// A gradient as the kernel sees it: of its chunks one a block.
struct CudaSummed {
  const void* g;
  int64_t length;       // elements
  int32_t first_block;  // the launch's blocks before it
  int32_t first_sum;    // the chunks of all gradients before it
};

constexpr int kNormTableBytes = 32'736;  // beside the rest of NormLaunch

struct NormLaunch {
  double* sums;  // of the chunks
  int32_t count;
  alignas(8) unsigned char tables[kNormTableBytes];
};
static_assert(sizeof(NormLaunch) <= kLaunchBytes);

// Sums all gradients, in as few launches as fit, and then the chunks. `sums` is that of
// `sum_squares_cpu`, on the device. Returns null or CUDA's words for what went wrong.
const char* sum_squares_in_launches(const std::vector<Summed>& grads, double* sums, void* stream);

// The kernels: the chunks of gradients of one dtype, and the sum of `chunks` sums.
const char* squares_cuda(Dtype dtype, const NormLaunch& launch, int64_t blocks, void* stream);
const char* sums_cuda(double* sums, int64_t chunks, void* stream);
