#include "summed.h"

#include <algorithm>
#include <utility>

namespace {

// Whether the elements fill a range of memory exactly once, in whatever order.
bool is_dense(const View& view) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int32_t d = 0; d < view.ndim; ++d) {
    if (view.shape[d] != 1) dims.emplace_back(view.strides[d], view.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return numel_of(view) == 0;
    expected *= size;
  }
  return true;
}

}  // namespace

std::vector<Summed> summed(const std::vector<View>& grads, const View& sums, DLDevice device) {
  std::vector<Summed> result;
  int64_t chunks = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    const View& grad = grads[i];
    const int64_t length = numel_of(grad);
    STD_TORCH_CHECK(same(grad.device, device) && (is_contiguous(grad) || is_dense(grad)),
                    "sum_squares_: gradient ", i, " is on another device or not dense");
    STD_TORCH_CHECK(grad.data != nullptr || length == 0, "sum_squares_: gradient ", i,
                    " has no memory");
    result.push_back({grad.data, length, dtype_of(grad.dtype)});
    chunks += norm_chunks(length);
  }
  STD_TORCH_CHECK(same(sums.dtype, kDouble) && same(sums.device, device) && is_contiguous(sums) &&
                      numel_of(sums) == 1 + chunks,
                  "sum_squares_: `sums` must be contiguous, float64, on the gradients' device and "
                  "of ",
                  1 + chunks, " elements");
  return result;
}
