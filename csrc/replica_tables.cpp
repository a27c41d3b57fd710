#include "replica_tables.h"

#include <algorithm>
#include <numeric>

// Whether the elements fill a range of memory exactly once, in whatever order.
static bool is_dense(const View& view) {
  std::vector<int32_t> order(view.ndim);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int32_t a, int32_t b) { return view.strides[a] < view.strides[b]; });
  int64_t expected = 1;
  for (const int32_t d : order) {
    if (view.shape[d] == 1) continue;
    if (view.strides[d] != expected) return numel_of(view) == 0;
    expected *= view.shape[d];
  }
  return true;
}

std::vector<Replicated> replicated(const std::vector<View>& params, int64_t replicas, double alpha,
                                   DLDevice device) {
  const int64_t total = static_cast<int64_t>(params.size());
  STD_TORCH_CHECK(replicas >= 1 && total % replicas == 0, "pull_: ", total,
                  " tensors are not the parameters of ", replicas, " replicas");
  STD_TORCH_CHECK(alpha >= 0 && alpha <= 1, "pull_: alpha is ", alpha, ", not in [0, 1]");
  const int64_t count = total / replicas;
  std::vector<Replicated> result(count);
  for (int64_t i = 0; i < count; ++i) {
    const View& first = params[i];
    Replicated& param = result[i];
    param.length = numel_of(first);
    param.dtype = dtype_of(first.dtype);
    STD_TORCH_CHECK(same(first.device, device) && is_dense(first), "pull_: parameter ", i,
                    " is on another device, or has gaps");
    for (int64_t k = 0; k < replicas; ++k) {
      const View& view = params[k * count + i];
      STD_TORCH_CHECK(alike(view, first), "pull_: parameter ", i, " of replica ", k,
                      " differs from the first in device, dtype, shape or layout");
      STD_TORCH_CHECK(view.data != nullptr || param.length == 0, "pull_: parameter ", i,
                      " of replica ", k, " has no memory");
      param.theta.push_back(view.data);
    }
  }
  return result;
}
