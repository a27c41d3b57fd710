// Gradients into launches: one dtype each, as many gradients as fit.
#include <cstring>

#include "cuda/norm_cuda.h"

namespace {

constexpr int64_t kMostChunks = 1 << 30;  // a grid has 2^31 - 1 blocks

const char* launches_of(Dtype dtype, const std::vector<Summed>& grads, double* sums, void* stream) {
  NormLaunch launch;
  launch.sums = sums;
  std::vector<CudaSummed> rows;
  int64_t blocks = 0, chunks = 0;

  auto flush = [&]() -> const char* {
    if (rows.empty()) return nullptr;
    launch.count = static_cast<int32_t>(rows.size());
    std::memcpy(launch.tables, rows.data(), rows.size() * sizeof(CudaSummed));
    const char* error = squares_cuda(dtype, launch, blocks, stream);
    rows.clear();
    blocks = 0;
    return error;
  };

  for (const Summed& grad : grads) {
    const int64_t own = norm_chunks(grad.length);
    if (grad.dtype == dtype && own > 0) {
      if ((rows.size() + 1) * sizeof(CudaSummed) > kNormTableBytes || blocks + own > kMostChunks) {
        if (const char* error = flush()) return error;
      }
      rows.push_back(
          {grad.g, grad.length, static_cast<int32_t>(blocks), static_cast<int32_t>(chunks)});
      blocks += own;
    }
    chunks += own;
  }
  return flush();
}

}  // namespace

const char* sum_squares_in_launches(const std::vector<Summed>& grads, double* sums, void* stream) {
  int64_t chunks = 0;
  for (const Summed& grad : grads) chunks += norm_chunks(grad.length);
  const char* error = nullptr;
#define RBWA_LAUNCH(dtype, ...) \
  if (error == nullptr) error = launches_of(Dtype::dtype, grads, sums + 1, stream);
  RBWA_DTYPES(RBWA_LAUNCH)
#undef RBWA_LAUNCH
  return error != nullptr ? error : sums_cuda(sums, chunks, stream);
}
