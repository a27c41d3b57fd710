// The tables that Python hands to an operator, as views; `resolve` checks all of them and turns
// them into segments with addresses. A kernel trusts the segments it is given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "dlpack.h"
#include "step.h"

// A tensor as the checks see it. dtype.bits is 0 for an absent one.
using View = DLTensor;

constexpr DLDataType kInt32{kDLInt, 32, 1};
constexpr DLDataType kInt64{kDLInt, 64, 1};
constexpr DLDataType kFloat{kDLFloat, 32, 1};
constexpr DLDataType kDouble{kDLFloat, 64, 1};

// Columns of the segment table, which engine/segments.py writes. A stream's column says which of
// the `state` tensors it is, -1 where the segment has none.
enum SegmentColumn {
  kLength,  // elements
  kRow,     // of the coefficient tables: its group's usual one
  kSampling,
  kShape,  // where this segment's sizes, then its strides, start in `shapes`
  kDims,
  kDtype,  // of the parameter, as in convert.h
  kAverage,
  kMaster,
#define RBWA_COLUMN(stream, when) kColumn_##stream,
  RBWA_KEPT(RBWA_COLUMN)
#undef RBWA_COLUMN
      kSegmentColumns,
};

// What stays the same from one step to the next, as far as memory goes.
struct Tables {
  std::vector<View> state;  // vectors: each stream in the order of its memory
  View segments, shapes;
  View ages;  // int64 (segments): steps taken with the kept streams; `grow` counts
  View rows, samplings;
};

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

// The memory of a contiguous table on the CPU, or an error that names it.
template <typename T>
const T* table_of(const View& view, DLDataType type, const char* name);

// Segments with the addresses of this very step, on one device, or an error; nothing has been
// changed then. With `every_average` the average's address is given also where the host's samplings
// say that it is not touched.
std::vector<Segment> resolve(const std::vector<View>& params, const std::vector<View>& grads,
                             const Tables& tables, DLDevice device, bool every_average = false);

// Counts the step for the segments that took it with their kept streams.
void grow(const std::vector<Segment>& segments, const Tables& tables);

View view_of(const torch::stable::Tensor& tensor);
View view_of(const std::optional<torch::stable::Tensor>& tensor);

template <typename T>
std::vector<View> views_of(const std::vector<T>& tensors) {
  std::vector<View> views;
  views.reserve(tensors.size());
  for (const T& tensor : tensors) views.push_back(view_of(tensor));
  return views;
}
