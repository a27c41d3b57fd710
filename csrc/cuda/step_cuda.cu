// The CUDA kernels: one block a chunk, the work of a thread in cuda/body.h. No torch header.
#include <cuda_runtime.h>

#include "cuda/body.h"
#include "cuda/kernel.h"
#include "cuda/launch_kernel.h"

namespace {

template <typename S, typename W, typename M, typename A, Kind most, bool averaged, typename T,
          int bytes>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Launch<T, bytes> launch) {
  step_thread<S, W, M, A, most, averaged>(launch, blockIdx.x, threadIdx.x);
}

template <typename S, typename W, typename M, typename A, Kind most, typename T>
__global__ void __launch_bounds__(kThreads)
    several_kernel(const __grid_constant__ Launch<T> launch) {
  step_thread<S, W, M, A, most, true, true>(launch, blockIdx.x, threadIdx.x);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) age_kernel(const __grid_constant__ Launch<T> launch) {
  age_thread(launch, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

template <typename T>
const char* launch_age(const void* launch, void* stream) {
  const auto& typed = *static_cast<const Launch<T>*>(launch);
  return launch_kernel(age_kernel<T>, (typed.segment_count + kThreads - 1) / kThreads, stream,
                       typed);
}

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const Setting* settings, Schedule* schedules, int64_t groups) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group < groups) prepare(settings[group], schedules[group]);
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const __grid_constant__ DeviceCounters counters) {
  if (counters.found_inf != nullptr && *counters.found_inf != 0) return;
  const int64_t step = counters.counts[0] + 1;
  advance(counters, step, threadIdx.x, kThreads);
  __syncthreads();  // every thread has read the count
  if (threadIdx.x == 0) counters.counts[0] = step;
}

template <typename S, typename W, typename M, typename A, Kind most, bool averaged>
const char* launch_step(const void* launch, int64_t blocks, void* stream) {
  using T = typename Arithmetic<S>::type;
  if constexpr (kHasSmall<S, W, A>) {
    if (static_cast<const Launch<T>*>(launch)->end <= kSmallTableBytes) {
      return launch_kernel(step_kernel<S, W, M, A, most, averaged, T, kSmallTableBytes>, blocks,
                           stream, *static_cast<const Launch<T, kSmallTableBytes>*>(launch));
    }
  }
  return launch_kernel(step_kernel<S, W, M, A, most, averaged, T, kTableBytes>, blocks, stream,
                       *static_cast<const Launch<T>*>(launch));
}

}  // namespace

const char* step_cuda(const KernelKey& key, const void* launch, int64_t blocks, void* stream) {
  if (key.several) {
    return with_several(key, [&]<typename S, typename W, typename M, typename A, Kind most>() {
      using T = typename Arithmetic<S>::type;
      return launch_kernel(several_kernel<S, W, M, A, most, T>, blocks, stream,
                           *static_cast<const Launch<T>*>(launch));
    });
  }
  return with_kernel(
      key, [&]<typename S, typename W, typename M, typename A, Kind most, bool averaged>() {
        return launch_step<S, W, M, A, most, averaged>(launch, blocks, stream);
      });
}

const char* age_cuda(const KernelKey& key, const void* launch, void* stream) {
  return key.dtype == Dtype::kFloat64 ? launch_age<double>(launch, stream)
                                      : launch_age<float>(launch, stream);
}

const char* prepare_cuda(const Setting* settings, Schedule* schedules, int64_t groups,
                         void* stream) {
  return launch_kernel(prepare_kernel, (groups + kThreads - 1) / kThreads, stream, settings,
                       schedules, groups);
}

const char* advance_cuda(const DeviceCounters& counters, void* stream) {
  return launch_kernel(advance_kernel, 1, stream, counters);
}

int cuda_toolkit() { return CUDART_VERSION; }
