// One parallel region over the chunks of all parameters, as in cpu/step_cpu.cpp.
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <vector>

#include "replicas.h"

namespace {

constexpr int64_t kChunk = 1024;
constexpr int64_t kWorthThreads = 1 << 15;  // elements of all replicas, see cpu/step_cpu.cpp

struct Work {
  const std::vector<Replicated>& params;
  const Pull& pull;
  std::vector<int64_t> first_chunk;  // of each parameter, and after the last one their total
};

void pull_chunks(int64_t begin, int64_t end, void* context) {
  const Work& work = *static_cast<const Work*>(context);
  const auto after = std::upper_bound(work.first_chunk.begin(), work.first_chunk.end(), begin);
  for (size_t i = after - work.first_chunk.begin() - 1; i < work.params.size() && begin < end;
       ++i) {
    const int64_t stop = std::min(end, work.first_chunk[i + 1]);
    if (stop == begin) continue;  // an empty parameter
    const int64_t from = (begin - work.first_chunk[i]) * kChunk;
    const int64_t to = std::min(work.params[i].length, (stop - work.first_chunk[i]) * kChunk);
    pull_range_cpu(work.params[i], work.pull, from, to - from);
    begin = stop;
  }
}

}  // namespace

void pull_cpu(const std::vector<Replicated>& params, const Pull& pull) {
  Work work{params, pull, {0}};
  int64_t elements = 0;
  for (const Replicated& param : params) {
    work.first_chunk.push_back(work.first_chunk.back() + (param.length + kChunk - 1) / kChunk);
    elements += param.length * static_cast<int64_t>(param.theta.size());
  }
  const int64_t chunks = work.first_chunk.back();
  const int64_t chunks_a_thread = elements < kWorthThreads ? chunks : 1;
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, chunks, chunks_a_thread, pull_chunks, &work));
}
