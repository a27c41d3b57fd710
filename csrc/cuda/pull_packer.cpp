// Parameters of K models into launches: one dtype each, as many parameters as fit.
#include <algorithm>
#include <cstring>

#include "cuda/pull_cuda.h"

namespace {

constexpr int64_t kMostChunks = 1 << 30;  // a grid has 2^31 - 1 blocks

template <typename T>
const char* launches_of(Dtype dtype, const std::vector<Replicated>& params, const Pull& pull,
                        void* stream) {
  PullLaunch<T> launch;
  launch.share = static_cast<T>(pull.share);
  launch.alpha = static_cast<T>(pull.alpha);
  std::vector<CudaReplicated> rows;
  std::vector<void*> addresses;
  int64_t chunks = 0;

  auto flush = [&]() -> const char* {
    if (rows.empty()) return nullptr;
    launch.count = static_cast<int32_t>(rows.size());
    launch.addresses_at = static_cast<int32_t>(rows.size() * sizeof(CudaReplicated));
    std::memcpy(launch.tables, rows.data(), launch.addresses_at);
    std::memcpy(launch.tables + launch.addresses_at, addresses.data(),
                addresses.size() * sizeof(void*));
    const char* error = pull_cuda(dtype, &launch, chunks, stream);
    rows.clear(), addresses.clear();
    chunks = 0;
    return error;
  };

  for (const Replicated& param : params) {
    if (param.dtype != dtype || param.length == 0) continue;
    const size_t replicas = param.theta.size();
    launch.replicas = static_cast<int32_t>(replicas);
    const int64_t own = (param.length + kSmallChunk - 1) / kSmallChunk;
    const size_t bytes =
        (rows.size() + 1) * sizeof(CudaReplicated) + (addresses.size() + replicas) * sizeof(void*);
    if (bytes > kPullTableBytes || chunks + own > kMostChunks) {
      if (const char* error = flush()) return error;
    }
    const bool vectors = std::all_of(param.theta.begin(), param.theta.end(), [](const void* p) {
      return reinterpret_cast<uintptr_t>(p) % 16 == 0;
    });
    rows.push_back({param.length, static_cast<int32_t>(chunks),
                    static_cast<int32_t>(addresses.size()), vectors});
    addresses.insert(addresses.end(), param.theta.begin(), param.theta.end());
    chunks += own;
  }
  return flush();
}

}  // namespace

const char* pull_in_launches(const std::vector<Replicated>& params, const Pull& pull,
                             void* stream) {
  const char* error = nullptr;
#define RBWA_LAUNCH(dtype, storage, ...) \
  if (error == nullptr)                  \
    error = launches_of<typename Arithmetic<storage>::type>(Dtype::dtype, params, pull, stream);
  RBWA_DTYPES(RBWA_LAUNCH)
#undef RBWA_LAUNCH
  return error;
}
