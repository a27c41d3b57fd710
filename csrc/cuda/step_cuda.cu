// The CUDA kernels: one block a chunk, the work of a thread in cuda/body.h. No torch header.
#include <cuda_runtime.h>

#include "cuda/body.h"
#include "cuda/kernel.h"
#include "cuda/launch_kernel.h"

namespace {

template <typename S, typename W, typename A, Rule most, bool averaged, typename T, int bytes>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Launch<T, bytes> launch) {
  step_thread<S, W, A, most, averaged>(launch, blockIdx.x, threadIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const __grid_constant__ Deferred deferred) {
  if (deferred.found_inf != nullptr && *deferred.found_inf != 0) return;
  const int64_t step = deferred.counts[0] + 1;
  advance(deferred, step, threadIdx.x, kThreads);
  __syncthreads();  // every thread has read the count
  if (threadIdx.x == 0) deferred.counts[0] = step;
}

template <typename S, typename W, typename A, Rule most, bool averaged>
const char* launch_step(const void* launch, int64_t blocks, void* stream) {
  using T = typename Arithmetic<S>::type;
  if constexpr (kHasSmall<S, W, A>) {
    if (static_cast<const Launch<T>*>(launch)->end <= kSmallTableBytes) {
      return launch_kernel(step_kernel<S, W, A, most, averaged, T, kSmallTableBytes>, blocks,
                           stream, *static_cast<const Launch<T, kSmallTableBytes>*>(launch));
    }
  }
  return launch_kernel(step_kernel<S, W, A, most, averaged, T, kTableBytes>, blocks, stream,
                       *static_cast<const Launch<T>*>(launch));
}

template <typename S, typename W, typename A, bool averaged>
const char* with_rule(Rule rule, const void* launch, int64_t blocks, void* stream) {
  switch (rule) {
    case Rule::kDifference:
      return launch_step<S, W, A, Rule::kDifference, averaged>(launch, blocks, stream);
    case Rule::kMomentum:
      return launch_step<S, W, A, Rule::kMomentum, averaged>(launch, blocks, stream);
    default:
      return launch_step<S, W, A, Rule::kPlain, averaged>(launch, blocks, stream);
  }
}

template <typename S>
const char* with_average(const Streams& s, const void* launch, int64_t blocks, void* stream) {
  if constexpr (sizeof(S) == 2) {
    if (s.theta_dtype == Dtype::kFloat32) {
      if (!s.averaged) return with_rule<S, float, float, false>(s.rule, launch, blocks, stream);
      return with_rule<S, float, float, true>(s.rule, launch, blocks, stream);
    }
  }
  if (!s.averaged) return with_rule<S, S, S, false>(s.rule, launch, blocks, stream);
  if constexpr (sizeof(S) == 2) {
    if (s.a_dtype == Dtype::kFloat32) {
      return with_rule<S, S, float, true>(s.rule, launch, blocks, stream);
    }
  }
  return with_rule<S, S, S, true>(s.rule, launch, blocks, stream);
}

}  // namespace

const char* step_cuda(const Streams& streams, const void* launch, int64_t blocks, void* stream) {
  switch (streams.dtype) {
    case Dtype::kFloat32:
      return with_average<float>(streams, launch, blocks, stream);
    case Dtype::kFloat64:
      return with_average<double>(streams, launch, blocks, stream);
    case Dtype::kBfloat16:
      return with_average<Bfloat16>(streams, launch, blocks, stream);
    default:
      return with_average<Float16>(streams, launch, blocks, stream);
  }
}

const char* advance_cuda(const Deferred& deferred, void* stream) {
  return launch_kernel(advance_kernel, 1, stream, deferred);
}

int cuda_toolkit() { return CUDART_VERSION; }
