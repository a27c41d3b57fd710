#include "tables.h"

#include "dispatch.h"

template <typename T>
const T* table_of(const View& view, DLDataType type, const char* name) {
  STD_TORCH_CHECK(
      same(view.dtype, type) && view.device.device_type == kDLCPU && is_contiguous(view),
      "step_: `", name, "` must be a contiguous CPU table of the documented dtype");
  return static_cast<const T*>(view.data);
}

template const int64_t* table_of(const View&, DLDataType, const char*);
template const double* table_of(const View&, DLDataType, const char*);
template const Row* table_of(const View&, DLDataType, const char*);
template const Sampling* table_of(const View&, DLDataType, const char*);
template const FurtherRow* table_of(const View&, DLDataType, const char*);

// `step` is everybody's: where it is not the count's own rounding, somebody has set it.
static int64_t age_of(int64_t counted, const float* step) {
  if (step == nullptr || *step == static_cast<float>(counted)) return counted;
  return *step >= 0 && *step < 9e18f ? static_cast<int64_t>(*step) : -1;
}

std::vector<Segment> resolve(const std::vector<View>& params, const std::vector<View>& grads,
                             const Tables& tables, DLDevice device, std::vector<Further>& further,
                             bool every_average) {
  const int64_t* column = table_of<int64_t>(tables.segments, kInt64, "segments");
  const int64_t* all_shapes = table_of<int64_t>(tables.shapes, kInt64, "shapes");
  const int64_t* ages = table_of<int64_t>(tables.ages, kInt64, "ages");
  const Row* rows = table_of<Row>(tables.rows, kDouble, "rows");
  const Sampling* samplings = table_of<Sampling>(tables.samplings, kDouble, "samplings");
  const int64_t count = static_cast<int64_t>(params.size());
  const int64_t shape_count = numel_of(tables.shapes);
  const int64_t row_count = numel_of(tables.rows) / kRowColumns;
  const int64_t sampling_count = numel_of(tables.samplings) / kSamplingColumns;
  const int64_t state_count = static_cast<int64_t>(tables.state.size());
  STD_TORCH_CHECK(static_cast<int64_t>(grads.size()) == count && numel_of(tables.ages) == count &&
                      numel_of(tables.segments) == count * kSegmentColumns,
                  "step_: ", count, " parameters, ", grads.size(), " gradients, ",
                  numel_of(tables.ages), " ages and ", numel_of(tables.segments) / kSegmentColumns,
                  " segments");

  const FurtherRow *next = nullptr, *last = nullptr;
  if (tables.further.dtype.bits != 0) {
    next = table_of<FurtherRow>(tables.further, kInt64, "further");
    last = next + numel_of(tables.further) / 3;
    STD_TORCH_CHECK(numel_of(tables.further) % 3 == 0, "step_: `further` has three columns");
    further.reserve(last - next);  // segments point into it
  }

  std::vector<Segment> result(count);
  for (int64_t i = 0; i < count; ++i, column += kSegmentColumns) {
    Segment& segment = result[i];
    segment.length = column[kLength];
    const int64_t row = column[kRow], dims = column[kDims];
    segment.sampling = column[kSampling];
    STD_TORCH_CHECK(row >= 0 && row % kRowsPerGroup == 0 && row < row_count - 1 &&
                        segment.sampling >= 0 && segment.sampling < sampling_count &&
                        segment.length >= 0 && dims >= 0 && column[kShape] >= 0 &&
                        dims <= shape_count / 2 && column[kShape] <= shape_count - 2 * dims,
                    "step_: segment ", i, " points outside its tables");
    const int64_t* sizes = all_shapes + column[kShape];
    const View& param = params[i];
    const DLDataType type = param.dtype;
    segment.dtype = dtype_of(type);
    STD_TORCH_CHECK(
        static_cast<int64_t>(segment.dtype) == column[kDtype] &&
            numel_of(param) == segment.length && (param.data != nullptr || segment.length == 0) &&
            fits(param, device, type, sizes, dims, segment.length),
        "step_: parameter ", i,
        " differs from what its segment was made for in dtype, device, shape or layout");
    const View& grad = grads[i];
    const bool moves = grad.dtype.bits != 0;
    STD_TORCH_CHECK(!moves || fits(grad, device, type, sizes, dims, segment.length),
                    "step_: gradient ", i,
                    " differs from its parameter in dtype, device, shape or layout");
    STD_TORCH_CHECK(!moves || grad.data != nullptr || segment.length == 0, "step_: gradient ", i,
                    " has no memory");
    segment.g = grad.data;

    // A stream's memory; null where the segment has none. `type` is what it must have, or gets.
    auto memory = [&](int64_t which, DLDataType* type, int64_t length, DLDevice place) -> void* {
      if (which == -1) return nullptr;
      STD_TORCH_CHECK(which >= 0 && which < state_count && is_contiguous(tables.state[which]) &&
                          numel_of(tables.state[which]) == length,
                      "step_: segment ", i, " points outside its state");
      const View& view = tables.state[which];
      STD_TORCH_CHECK(same(view.device, place), "step_: the state of segment ", i,
                      " is not on its device");
      STD_TORCH_CHECK(type->bits == 0 || same(view.dtype, *type), "step_: the streams of segment ",
                      i, " differ in dtype");
      *type = view.dtype;
      return view.data;
    };
    auto stream = [&](int64_t which, DLDataType* type) {
      return memory(which, type, segment.length, device);
    };
    DLDataType theta_type = type, a_type{};
    const bool master = column[kMaster] != -1;
    if (master) theta_type = {};
    segment.theta = master ? stream(column[kMaster], &theta_type) : param.data;
    segment.param = master ? param.data : nullptr;
    segment.theta_dtype = dtype_of(theta_type);
    STD_TORCH_CHECK(!master || (same(theta_type, kFloat) && is_narrow(segment.dtype)),
                    "step_: the master of segment ", i, " must be float32, of a 16-bit parameter");
    STD_TORCH_CHECK(has_kind(rows[row]), "step_: the row of segment ", i, " is of no kind");
    const Kind kind = kind_of(rows[row]);
    segment.kind = moves ? kind : Kind::kSample;
    segment.row = row;
    DLDataType step_type = kFloat, kept_type{};
    segment.step = static_cast<float*>(memory(column[kStep], &step_type, 1, {kDLCPU, 0}));
    segment.age = age_of(ages[i], segment.step);
    STD_TORCH_CHECK(segment.age >= 0, "step_: the age of segment ", i, " is no count");
#define RBWA_RESOLVE(name, when)                                                                 \
  segment.name = nullptr;                                                                        \
  if (keeps_##name(kind)) {                                                                      \
    segment.name = stream(column[kColumn_##name], &kept_type);                                   \
    STD_TORCH_CHECK(!moves || segment.name != nullptr || segment.length == 0, "step_: segment ", \
                    i, " lacks the stream " #name " of its row's kind");                         \
    segment.row = row + (segment.age == 0 && !is_adam(kind));                                    \
  }
    RBWA_KEPT(RBWA_RESOLVE)
#undef RBWA_RESOLVE
    segment.kept_dtype = kept_type.bits != 0 ? dtype_of(kept_type) : segment.theta_dtype;
    // Of kinds that may keep float32 beside 16-bit weights, schedule-free AdamW must: its z would
    // not move.
    const bool narrow = is_narrow(segment.theta_dtype) && kept_type.bits != 0;
    const bool wide = narrow && segment.kept_dtype == Dtype::kFloat32 && keeps_wide(kind);
    const bool as_theta = segment.kept_dtype == segment.theta_dtype;
    STD_TORCH_CHECK(wide || (as_theta && !(narrow && kind == Kind::kScheduleFree)),
                    "step_: the state of segment ", i,
                    " must have the dtype of its weights, or float32 for a 16-bit parameter");
    const bool sampled = every_average || samplings[segment.sampling].sample != 0;
    segment.a = sampled ? stream(column[kAverage], &a_type) : nullptr;
    segment.further = further.data() + further.size();
    for (; next != last && next->segment == i; ++next) {
      STD_TORCH_CHECK(next->sampling >= 0 && next->sampling < sampling_count,
                      "step_: an average of segment ", i, " points outside its tables");
      const Sampling& own = samplings[next->sampling];
      if (!every_average && own.sample == 0) continue;
      void* a = stream(next->state, &a_type);
      STD_TORCH_CHECK(a != nullptr || segment.length == 0, "step_: an average of segment ", i,
                      " has no memory");
      further.push_back({a, next->sampling, own.w, own.current != 0});
    }
    segment.further_count = further.data() + further.size() - segment.further;
    segment.a_dtype = a_type.bits != 0 ? dtype_of(a_type) : segment.theta_dtype;
    STD_TORCH_CHECK(segment.a_dtype == segment.theta_dtype ||
                        (segment.a_dtype == Dtype::kFloat32 && is_narrow(segment.dtype)),
                    "step_: the average of segment ", i,
                    " must have the parameter's dtype, or float32 for a 16-bit parameter");
  }
  STD_TORCH_CHECK(next == last, "step_: `further` is not sorted by segment");
  return result;
}

void grow(const std::vector<Segment>& segments, const Tables& tables) {
  int64_t* ages = static_cast<int64_t*>(tables.ages.data);
  for (size_t i = 0; i < segments.size(); ++i) {
    ages[i] = segments[i].age + keeps_any(segments[i].kind);
    if (segments[i].step != nullptr) *segments[i].step = static_cast<float>(ages[i]);
  }
}
