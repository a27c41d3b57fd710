// The CUDA sum of squares: one block a chunk, then one block for the chunks' sums; the work of a
// thread in cuda/norm_body.h. No torch header.
#include <cuda_runtime.h>

#include "cuda/launch_kernel.h"
#include "cuda/norm_body.h"

namespace {

// The sum of a block's lanes, for thread 0.
__device__ double folded(double lane) {
  __shared__ double lanes[kNormLanes];
  const int thread = threadIdx.x;
  lanes[thread] = lane;
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    fold_lane(lanes, half, thread);
  }
  return lanes[0];
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ NormLaunch launch) {
  const NormChunk chunk = chunk_of(launch, blockIdx.x);
  const double sum = folded(squares_lane<S>(chunk, threadIdx.x));
  if (threadIdx.x == 0) launch.sums[chunk.sum] = sum;
}

__global__ void __launch_bounds__(kThreads) sums_kernel(double* sums, int64_t chunks) {
  const double sum = folded(sums_lane(sums + 1, chunks, threadIdx.x));
  if (threadIdx.x == 0) sums[0] = sum;
}

}  // namespace

const char* squares_cuda(Dtype dtype, const NormLaunch& launch, int64_t blocks, void* stream) {
  return with_storage(dtype, [&]<typename S>() {
    return launch_kernel(squares_kernel<S>, blocks, stream, launch);
  });
}

const char* sums_cuda(double* sums, int64_t chunks, void* stream) {
  return launch_kernel(sums_kernel, 1, stream, sums, chunks);
}
