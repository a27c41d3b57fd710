// The CUDA backend without a GPU: everything of it but the launch itself, which is a loop over
// blocks and threads here. Tensors are on the CPU.

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <utility>

#include "cuda/body.h"
#include "cuda/device_tables.h"
#include "cuda/kernel.h"
#include "cuda/norm_body.h"
#include "cuda/norm_cuda.h"
#include "cuda/packer.h"
#include "cuda/pull_body.h"
#include "cuda/pull_cuda.h"
#include "python_tensors.h"
#include "replica_tables.h"

namespace {

namespace py = pybind11;

constexpr DLDevice kCpu{kDLCPU, 0};
int64_t launches = 0;
int64_t small_launches = 0;   // those of a kernel for small tables
int64_t tabled_launches = 0;  // those with a table of blocks
int64_t threads_run = 0;
int64_t failing = 0;  // the launch that fails, counted from now; 0: none

// Counts a launch; the words of one that fails.
const char* launched() {
  ++launches;
  return failing > 0 && --failing == 0 ? "out of luck" : nullptr;
}

// A kernel gets a copy of as many bytes as it was compiled for.
template <typename S, typename W, typename M, typename A, Kind most, bool averaged, int bytes,
          bool several = false>
void run_with(const void* launch, int64_t blocks) {
  using T = typename Arithmetic<S>::type;
  const auto given = std::make_unique<Launch<T, bytes>>();
  std::memcpy(given.get(), launch, sizeof(*given));
  small_launches += bytes == kSmallTableBytes;
  tabled_launches += given->blocks_at != 0;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < kThreads; ++thread) {
      step_thread<S, W, M, A, most, averaged, several>(*given, block, thread);
      ++threads_run;
    }
  }
}

template <typename S, typename W, typename M, typename A, Kind most, bool averaged>
void run_all(const void* launch, int64_t blocks) {
  using T = typename Arithmetic<S>::type;
  if constexpr (kHasSmall<S, W, A>) {
    if (static_cast<const Launch<T>*>(launch)->end <= kSmallTableBytes) {
      return run_with<S, W, M, A, most, averaged, kSmallTableBytes>(launch, blocks);
    }
  }
  run_with<S, W, M, A, most, averaged, kTableBytes>(launch, blocks);
}

template <typename S>
void pull_all(const void* launch, int64_t blocks) {
  using T = typename Arithmetic<S>::type;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < kThreads; ++thread) {
      pull_thread<S>(*static_cast<const PullLaunch<T>*>(launch), block, thread);
    }
  }
}

}  // namespace

const char* step_cuda(const KernelKey& key, const void* launch, int64_t blocks, void*) {
  if (const char* error = launched()) return error;
  if (key.several) {
    with_several(key, [&]<typename S, typename W, typename M, typename A, Kind most>() {
      run_with<S, W, M, A, most, true, kTableBytes, true>(launch, blocks);
    });
    return nullptr;
  }
  with_kernel(key, [&]<typename S, typename W, typename M, typename A, Kind most, bool averaged>() {
    run_all<S, W, M, A, most, averaged>(launch, blocks);
  });
  return nullptr;
}

template <typename T>
void age_all(const void* launch) {
  const auto& typed = *static_cast<const Launch<T>*>(launch);
  for (int64_t segment = 0; segment < typed.segment_count + 3; ++segment) {
    age_thread(typed, segment);
  }
}

const char* age_cuda(const KernelKey& key, const void* launch, void*) {
  if (const char* error = launched()) return error;
  key.dtype == Dtype::kFloat64 ? age_all<double>(launch) : age_all<float>(launch);
  return nullptr;
}

const char* pull_cuda(Dtype dtype, const void* launch, int64_t blocks, void*) {
  if (const char* error = launched()) return error;
  with_storage(dtype, [&]<typename S>() { pull_all<S>(launch, blocks); });
  return nullptr;
}

// Lanes in the shared memory of a block, folded by threads that wait for one another.
double folded(double* lanes) {
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    for (int thread = 0; thread < kThreads; ++thread) fold_lane(lanes, half, thread);
  }
  return lanes[0];
}

const char* squares_cuda(Dtype dtype, const NormLaunch& launch, int64_t blocks, void*) {
  if (const char* error = launched()) return error;
  with_storage(dtype, [&]<typename S>() {
    for (int64_t block = 0; block < blocks; ++block) {
      const NormChunk chunk = chunk_of(launch, block);
      double lanes[kNormLanes];
      for (int thread = 0; thread < kThreads; ++thread) {
        lanes[thread] = squares_lane<S>(chunk, thread);
      }
      launch.sums[chunk.sum] = folded(lanes);
    }
  });
  return nullptr;
}

const char* sums_cuda(double* sums, int64_t chunks, void*) {
  if (const char* error = launched()) return error;
  double lanes[kNormLanes];
  for (int thread = 0; thread < kThreads; ++thread) {
    lanes[thread] = sums_lane(sums + 1, chunks, thread);
  }
  sums[0] = folded(lanes);
  return nullptr;
}

const char* prepare_cuda(const Setting* settings, Schedule* schedules, int64_t groups, void*) {
  if (const char* error = launched()) return error;
  for (int64_t group = 0; group < groups; ++group) prepare(settings[group], schedules[group]);
  return nullptr;
}

const char* advance_cuda(const DeviceCounters& counters, void*) {
  if (counters.found_inf != nullptr && *counters.found_inf != 0) return nullptr;
  const int64_t step = counters.counts[0] + 1;
  for (int thread = 0; thread < kThreads; ++thread) advance(counters, step, thread, kThreads);
  counters.counts[0] = step;
  return nullptr;
}

PYBIND11_MODULE(emulated_cuda, module) {
  if (!find_exchange_table()) throw py::import_error("this torch has no DLPack exchange table");
  module.def("step", [](const PythonTables& fixed, const py::list& params, const py::list& grads,
                        py::handle clip) {
    DeviceTables own{};
    own.clip = view_of(clip);
    step_on(views_of(params), views_of(grads), fixed.tables, own, kCpu, nullptr);
  });
  module.def("sum_squares", [](const py::list& grads, py::handle sums) {
    sum_squares_on(views_of(grads), view_of(sums), kCpu, nullptr);
  });
  module.def("step_deferred", [](const PythonTables& fixed, const py::list& params,
                                 const py::list& grads, const py::list& lrs, py::handle samplings64,
                                 py::handle samplings32, py::handle marks, py::handle agings,
                                 py::handle grad_scale, py::handle found_inf, py::handle clip,
                                 py::handle settings, py::handle schedules) {
    const DeviceTables own{views_of(lrs),      view_of(samplings64), view_of(samplings32),
                           view_of(marks),     view_of(agings),      view_of(grad_scale),
                           view_of(found_inf), view_of(clip),        view_of(settings),
                           view_of(schedules)};
    step_on(views_of(params), views_of(grads), fixed.tables, own, kCpu, nullptr);
  });
  module.def("advance", [](py::handle counts, py::handle policies, py::handle samplings64,
                           py::handle samplings32, py::handle marks, py::handle found_inf,
                           py::handle schedules) {
    advance_on({view_of(counts), view_of(policies), view_of(samplings64), view_of(samplings32),
                view_of(marks), view_of(found_inf), view_of(schedules)},
               kCpu, nullptr);
  });
  module.def("pull", [](const py::list& params, int64_t replicas, double alpha) {
    pull_in_launches(replicated(views_of(params), replicas, alpha, kCpu), {1.0 / replicas, alpha},
                     nullptr);
  });
  module.def("fail", [](int64_t launch) { failing = launch; });
  module.def("launch_form",
             [](bool small, bool block_table) { launch_form = {small, block_table}; });
  module.def("small_launches", [] { return std::exchange(small_launches, 0); });
  module.def("tabled_launches", [] { return std::exchange(tabled_launches, 0); });
  module.def("launches", [] { return std::exchange(launches, 0); });
  module.def("threads_run", [] { return std::exchange(threads_run, 0); });
}
