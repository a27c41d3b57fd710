// One launch of a CUDA kernel. No torch header.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/kernel.h"

// Returns null, or CUDA's words for why this very launch failed. After <<<>>> only cudaGetLastError
// says so, and that also returns, and takes away, an error that another library has left behind.
template <typename... Arguments>
const char* launch_kernel(void (*kernel)(Arguments...), int64_t blocks, void* stream,
                          const std::type_identity_t<Arguments>&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                       dim3(kThreads), addresses, 0, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is reported here, so nobody else shall come upon it
  return cudaGetErrorString(error);
}
