// Tensors as the checks see them: memory, device, dtype, sizes and strides, nothing owned.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "convert.h"
#include "dlpack.h"

// dtype.bits is 0 for an absent tensor.
using View = DLTensor;

constexpr DLDataType kInt32{kDLInt, 32, 1};
constexpr DLDataType kInt64{kDLInt, 64, 1};
constexpr DLDataType kFloat{kDLFloat, 32, 1};
constexpr DLDataType kDouble{kDLFloat, 64, 1};

bool same(DLDataType a, DLDataType b);
bool same(DLDevice a, DLDevice b);
int64_t numel_of(const View& view);

// A parameter's dtype, or an error.
Dtype dtype_of(DLDataType type);

// Whether the elements fill a range of memory in the order of the dimensions.
bool is_contiguous(const View& view);

// Whether a tensor has the device, dtype, shape and layout that its segment was made for: `sizes`,
// then strides. A size of 1 has no meaningful stride, a tensor without elements no layout.
bool fits(const View& view, DLDevice device, DLDataType type, const int64_t* sizes, int64_t dims,
          int64_t length);

// Whether two tensors have the same device, dtype, shape and layout, and fill the memory they span.
bool alike(const View& a, const View& b);

View view_of(const torch::stable::Tensor& tensor);
View view_of(const std::optional<torch::stable::Tensor>& tensor);

template <typename T>
std::vector<View> views_of(const std::vector<T>& tensors) {
  std::vector<View> views;
  views.reserve(tensors.size());
  for (const T& tensor : tensors) views.push_back(view_of(tensor));
  return views;
}
