// One launch of the CUDA pull as the kernel gets it, by value, and the launcher. No torch, no CUDA
// header.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/kernel.h"
#include "replicas.h"

// A parameter as the kernel sees it. `first_chunk` counts the launch's chunks before it; its K
// addresses stand in the launch's table of addresses.
struct CudaReplicated {
  int64_t length;  // elements
  int32_t first_chunk;
  int32_t first_address;
  int32_t vectors;  // whether all addresses lie on the boundaries of vectors
};

constexpr int kPullTableBytes = 32'728;  // beside the rest of PullLaunch

template <typename T>
struct PullLaunch {
  T share, alpha;
  int32_t replicas;
  int32_t count;         // of parameters, at the start of `tables`
  int32_t addresses_at;  // bytes into `tables`
  alignas(8) unsigned char tables[kPullTableBytes];
};
static_assert(sizeof(PullLaunch<float>) <= kLaunchBytes &&
              sizeof(PullLaunch<double>) <= kLaunchBytes);

// A parameter's addresses are in one launch.
constexpr int64_t kMostReplicas = 4000;
static_assert(kMostReplicas * 8 + sizeof(CudaReplicated) <= kPullTableBytes);

// Pulls all parameters, in as few launches as fit. Returns null or CUDA's words for what went
// wrong.
const char* pull_in_launches(const std::vector<Replicated>& params, const Pull& pull, void* stream);

// The kernel. `launch` is a PullLaunch<float>, or a PullLaunch<double> for float64.
const char* pull_cuda(Dtype dtype, const void* launch, int64_t blocks, void* stream);
