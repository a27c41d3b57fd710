// One launch of the CUDA step as the kernel gets it, by value, and the launchers. No torch, no CUDA
// header.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "policy.h"
#include "schedule.h"
#include "step.h"
#include "update.h"

constexpr int kThreads = 256;
// A chunk is the work of one block: small ones spread a ResNet over all processors, large ones
// spare a large model the blocks' own time.
constexpr int64_t kSmallChunk = 4096;
constexpr int64_t kLargeChunk = 16384;
constexpr int64_t kLargeModel = 100'000'000;  // elements

// Kernel arguments may take 32,764 bytes (CUDA 12.1 and later, compute capability 7.0 and later).
constexpr int kLaunchBytes = 32'764;
constexpr int kTableBytes = 32'672;  // beside the rest of Launch
// What a launch hands over is fixed when its kernel is compiled, and is copied at every launch: a
// model of up to 80 tensors in float32 takes a kernel that gets 8 KB.
constexpr int kSmallTableBytes = 8'112;

// A segment as the kernel sees it. `first_chunk` counts the launch's chunks before it.
struct CudaSegment {
  void* theta;
  void* param;
  void* g;
  void* a;
#define RBWA_FIELD(stream, when) void* stream;
  RBWA_KEPT(RBWA_FIELD)
#undef RBWA_FIELD
  int64_t length;  // elements
  int32_t first_chunk;
  int32_t index;      // in the segment table, for its mark
  uint16_t group;     // of the launch's tables
  uint16_t sampling;  // of the launch's table, or of the device's
  uint8_t kind;       // as in Segment
  uint8_t first;      // whether it takes its first step with this kind (without marks)
  uint16_t further;   // where several averages of its own begin in the launch's table of them
};
static_assert(sizeof(CudaSegment) == 96);

// One of a segment's several averages, the first among them where it has a buffer. They stand one
// behind the other.
struct CudaFurther {
  void* a;
  uint16_t sampling;  // as CudaSegment's
  uint16_t last;      // of its segment
};

// A param group, and one age of its parameters: its usual row, and that of a parameter's first step
// with its kind.
template <typename T>
struct CudaGroup {
  Numbers<T> usual, first;
  Aging<T> aging;            // where the host counts
  double eta, rho, mu, nu;   // what it is made of
  const float* lr;           // in place of eta, if not null
  const Schedule* schedule;  // has c, alpha, gamma and rho, if not null
};

template <typename T>
struct CudaSampling {
  T scale, w, sample, current, write_back;
};

template <typename T, int table_bytes = kTableBytes>
struct Launch {
  const T* samplings;       // the device's rows of CudaSampling, or null: the launch has them
  int32_t* marks;           // as in DeviceCounters, or null: `first` says it
  Aging<T>* agings;         // for each segment, with `marks`; or null: the launch has them
  const float* grad_scale;  // null: 1
  const float* found_inf;   // not zero: nothing happens; null: never
  const double* clip;       // multiplies the gradients as they are read; null: 1
  int64_t chunk;            // elements
  int32_t segment_count;
  int32_t groups_at;  // bytes into `tables`; segments stand at 0
  int32_t samplings_at;
  int32_t further_at;
  int32_t blocks_at;  // uint16_t for each block: its segment; or 0: it is found by bisection
  int32_t end;        // of what stands in `tables`
  alignas(16) unsigned char tables[table_bytes];
};
static_assert(sizeof(Launch<float>) <= kLaunchBytes && sizeof(Launch<double>) <= kLaunchBytes);
// A small launch is the beginning of a large one.
static_assert(sizeof(Launch<float>) - kTableBytes ==
              sizeof(Launch<float, kSmallTableBytes>) - kSmallTableBytes);

// The kernels that are compiled for small launches as well.
template <typename S, typename W, typename A>
constexpr bool kHasSmall = sizeof(S) == 4 && sizeof(W) == 4 && sizeof(A) == 4;

// Each returns null, or CUDA's words for what went wrong. `launch` is a Launch<float>, or a
// Launch<double> for float64.
const char* step_cuda(const KernelKey& key, const void* launch, int64_t blocks, void* stream);
const char* age_cuda(const KernelKey& key, const void* launch, void* stream);
const char* prepare_cuda(const Setting* settings, Schedule* schedules, int64_t groups,
                         void* stream);
const char* advance_cuda(const DeviceCounters& counters, void* stream);
int cuda_toolkit();  // the version it was compiled with, 13000 for 13.0
