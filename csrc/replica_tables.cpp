#include "replica_tables.h"

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
    STD_TORCH_CHECK(same(first.device, device), "pull_: parameter ", i, " is on another device");
    for (int64_t k = 0; k < replicas; ++k) {
      const View& view = params[k * count + i];
      STD_TORCH_CHECK(alike(view, first), "pull_: parameter ", i, " of replica ", k,
                      " differs from the first in device, dtype, shape or layout, or has gaps");
      STD_TORCH_CHECK(view.data != nullptr || param.length == 0, "pull_: parameter ", i,
                      " of replica ", k, " has no memory");
      param.theta.push_back(view.data);
    }
  }
  return result;
}
