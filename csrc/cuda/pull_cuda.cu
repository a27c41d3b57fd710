// The CUDA pull: one block a chunk, the work of a thread in cuda/pull_body.h. No torch header.
#include <cuda_runtime.h>

#include "cuda/launch_kernel.h"
#include "cuda/pull_body.h"
#include "cuda/pull_cuda.h"

namespace {

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads)
    pull_kernel(const __grid_constant__ PullLaunch<T> launch) {
  pull_thread<S>(launch, blockIdx.x, threadIdx.x);
}

template <typename S>
const char* run(const void* launch, int64_t blocks, void* stream) {
  using T = typename Arithmetic<S>::type;
  return launch_kernel(pull_kernel<S, T>, blocks, stream,
                       *static_cast<const PullLaunch<T>*>(launch));
}

}  // namespace

const char* pull_cuda(Dtype dtype, const void* launch, int64_t blocks, void* stream) {
  return with_storage(dtype, [&]<typename S>() { return run<S>(launch, blocks, stream); });
}
