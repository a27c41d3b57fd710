// The tables that Python hands to an operator, as views; `resolve` checks all of them and turns
// them into segments with addresses. A kernel trusts the segments it is given.
#pragma once

#include <vector>

#include "step.h"
#include "views.h"

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
  kStep,
#define RBWA_COLUMN(stream, when) kColumn_##stream,
  RBWA_KEPT(RBWA_COLUMN)
#undef RBWA_COLUMN
      kSegmentColumns,
};

// What stays the same from one step to the next, as far as memory goes.
struct Tables {
  std::vector<View> state;  // vectors: each stream in the order of its memory
  View segments, shapes;
  View ages;  // int64 (segments): steps taken with the kept streams, where no `step` says it
  View rows, samplings;
  View further;  // int64 (m, 3): struct FurtherRow, sorted by segment; or absent
};

// An average beside a segment's first.
struct FurtherRow {
  int64_t segment, state, sampling;
};

// The memory of a contiguous table on the CPU, or an error that names it.
template <typename T>
const T* table_of(const View& view, DLDataType type, const char* name);

// Segments with the addresses of this very step, on one device, or an error; nothing has been
// changed then. With `every_average` the average's address is given also where the host's samplings
// say that it is not touched. The segments point to the averages beside their first in `further`.
std::vector<Segment> resolve(const std::vector<View>& params, const std::vector<View>& grads,
                             const Tables& tables, DLDevice device, std::vector<Further>& further,
                             bool every_average = false);

// Counts the step for the segments that took it with their kept streams.
void grow(const std::vector<Segment>& segments, const Tables& tables);
