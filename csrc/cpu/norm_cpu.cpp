// One parallel region over the chunks of all gradients, as in cpu/step_cpu.cpp.
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <vector>

#include "norm.h"

namespace {

constexpr int64_t kWorthThreads = 1 << 16;  // elements, see cpu/step_cpu.cpp

struct Work {
  const std::vector<Summed>& grads;
  double* sums;                      // of the chunks
  std::vector<int64_t> first_chunk;  // of each gradient, and after the last one their total
};

void sum_chunks(int64_t begin, int64_t end, void* context) {
  const Work& work = *static_cast<const Work*>(context);
  const auto after = std::upper_bound(work.first_chunk.begin(), work.first_chunk.end(), begin);
  for (size_t i = after - work.first_chunk.begin() - 1; begin < end; ++i) {
    const int64_t stop = std::min(end, work.first_chunk[i + 1]);
    squares_cpu(work.grads[i], begin - work.first_chunk[i], stop - begin, work.sums + begin);
    begin = stop;
  }
}

}  // namespace

void sum_squares_cpu(const std::vector<Summed>& grads, double* sums) {
  Work work{grads, sums + 1, {0}};
  int64_t elements = 0;
  for (const Summed& grad : grads) {
    work.first_chunk.push_back(work.first_chunk.back() + norm_chunks(grad.length));
    elements += grad.length;
  }
  const int64_t chunks = work.first_chunk.back();
  const int64_t chunks_a_thread = elements < kWorthThreads ? chunks : 1;
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, chunks, chunks_a_thread, sum_chunks, &work));
  sums[0] = sums_cpu(work.sums, chunks);
}
