// The CUDA pull: one block a chunk, the work of a thread in replicas_cuda_body.h. No torch header.
#include <cuda_runtime.h>

#include "replicas_cuda.h"
#include "replicas_cuda_body.h"

namespace {

template <typename S, typename T>
__global__ void __launch_bounds__(kThreads)
    pull_kernel(const __grid_constant__ PullLaunch<T> launch) {
  pull_thread<S>(launch, blockIdx.x, threadIdx.x);
}

template <typename S>
void run(const void* launch, int64_t blocks, cudaStream_t stream) {
  using T = typename Arithmetic<S>::type;
  pull_kernel<S, T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      *static_cast<const PullLaunch<T>*>(launch));
}

}  // namespace

const char* pull_cuda(Dtype dtype, const void* launch, int64_t blocks, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == Dtype::kFloat32) run<float>(launch, blocks, on);
  if (dtype == Dtype::kFloat64) run<double>(launch, blocks, on);
  if (dtype == Dtype::kBfloat16) run<Bfloat16>(launch, blocks, on);
  if (dtype == Dtype::kFloat16) run<Float16>(launch, blocks, on);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
