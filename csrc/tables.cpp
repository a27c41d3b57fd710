#include "tables.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits; }

bool same(DLDevice a, DLDevice b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

int64_t numel_of(const View& view) {
  int64_t numel = 1;
  for (int32_t d = 0; d < view.ndim; ++d) numel *= view.shape[d];
  return numel;
}

bool is_contiguous(const View& view) {
  int64_t expected = 1;
  for (int32_t d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] != 1 && view.strides[d] != expected) return false;
    expected *= view.shape[d];
  }
  return true;
}

template <typename T>
const T* table_of(const View& view, DLDataType type, const char* name) {
  STD_TORCH_CHECK(
      same(view.dtype, type) && view.device.device_type == kDLCPU && is_contiguous(view),
      "step_: `", name, "` must be a contiguous CPU table of the documented dtype");
  return static_cast<const T*>(view.data);
}

Dtype dtype_of(DLDataType type) {
  if (same(type, kFloat)) return Dtype::kFloat32;
  if (same(type, kDouble)) return Dtype::kFloat64;
  STD_TORCH_CHECK(type.bits == 16 && (type.code == kDLBfloat || type.code == kDLFloat),
                  "parameters must be float32, float64, bfloat16 or float16");
  return type.code == kDLBfloat ? Dtype::kBfloat16 : Dtype::kFloat16;
}

bool fits(const View& view, DLDevice device, DLDataType type, const int64_t* sizes, int64_t dims,
          int64_t length) {
  if (!same(view.dtype, type) || !same(view.device, device) || view.ndim != dims) {
    return false;
  }
  const int64_t* strides = sizes + dims;
  for (int64_t d = 0; d < dims; ++d) {
    if (view.shape[d] != sizes[d]) return false;
    if (view.strides[d] != strides[d] && sizes[d] != 1 && length != 0) return false;
  }
  return true;
}

bool alike(const View& a, const View& b) {
  if (!same(a.dtype, b.dtype) || !same(a.device, b.device) || a.ndim != b.ndim) return false;
  int64_t last = 0;  // element of the range that the tensor spans
  for (int32_t d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
    if (a.strides[d] != b.strides[d] && a.shape[d] != 1) return false;
    last += (a.shape[d] - 1) * a.strides[d];
  }
  const int64_t numel = numel_of(a);
  return numel == 0 || last + 1 == numel;
}

template const int64_t* table_of(const View&, DLDataType, const char*);
template const Row* table_of(const View&, DLDataType, const char*);
template const Sampling* table_of(const View&, DLDataType, const char*);

std::vector<Segment> resolve(const Tables& tables, DLDevice device, bool every_average) {
  const int64_t* column = table_of<int64_t>(tables.segments, kInt64, "segments");
  const int64_t* all_shapes = table_of<int64_t>(tables.shapes, kInt64, "shapes");
  const Row* rows = table_of<Row>(tables.rows, kDouble, "rows");
  const Sampling* samplings = table_of<Sampling>(tables.samplings, kDouble, "samplings");
  const int64_t count = static_cast<int64_t>(tables.params.size());
  const int64_t shape_count = numel_of(tables.shapes);
  const int64_t row_count = numel_of(tables.rows) / kRowColumns;
  const int64_t sampling_count = numel_of(tables.samplings) / kSamplingColumns;
  const int64_t state_count = static_cast<int64_t>(tables.state.size());
  STD_TORCH_CHECK(static_cast<int64_t>(tables.grads.size()) == count &&
                      numel_of(tables.segments) == count * kSegmentColumns,
                  "step_: ", count, " parameters, ", tables.grads.size(), " gradients and ",
                  numel_of(tables.segments) / kSegmentColumns, " segments");
  std::vector<int64_t> numel;
  numel.reserve(tables.state.size());
  for (const View& buffer : tables.state) {
    STD_TORCH_CHECK(is_contiguous(buffer), "step_: a buffer of the state is not contiguous");
    numel.push_back(numel_of(buffer));
  }

  std::vector<Segment> result(count);
  for (int64_t i = 0; i < count; ++i, column += kSegmentColumns) {
    Segment& segment = result[i];
    segment.length = column[kLength];
    segment.row = column[kRow];
    segment.sampling = column[kSampling];
    const int64_t dims = column[kDims];
    STD_TORCH_CHECK(segment.row >= 0 && segment.row < row_count && segment.sampling >= 0 &&
                        segment.sampling < sampling_count && segment.length >= 0 && dims >= 0 &&
                        column[kShape] >= 0 && dims <= shape_count / 2 &&
                        column[kShape] <= shape_count - 2 * dims,
                    "step_: segment ", i, " points outside its tables");
    auto stream = [&](SegmentColumn which, DLDataType* type) -> void* {
      const int64_t index = column[which];
      const int64_t offset = column[which + 1];
      if (index == -1) return nullptr;
      STD_TORCH_CHECK(index >= 0 && index < state_count && offset >= 0 &&
                          offset <= numel[index] - segment.length,
                      "step_: segment ", i, " points outside its buffer");
      const View& buffer = tables.state[index];
      STD_TORCH_CHECK(same(buffer.device, device), "step_: the buffers of segment ", i,
                      " are not on its device");
      STD_TORCH_CHECK(type->bits == 0 || same(buffer.dtype, *type),
                      "step_: the streams of segment ", i, " differ in dtype");
      *type = buffer.dtype;
      return static_cast<char*>(buffer.data) + offset * (buffer.dtype.bits / 8);
    };
    const bool momentum = rows[segment.row].mu != 0;
    const View& param = tables.params[i];
    const DLDataType type = param.dtype;
    DLDataType theta_type{}, a_type{};
    segment.dtype = dtype_of(type);
    const bool master = column[kMaster] != -1;
    if (!master) theta_type = type;
    segment.theta = master ? stream(kMaster, &theta_type) : param.data;
    segment.param = master ? param.data : nullptr;
    segment.theta_dtype = dtype_of(theta_type);
    STD_TORCH_CHECK(!master || (same(theta_type, kFloat) && type.bits == 16),
                    "step_: the master of segment ", i, " must be float32, of a 16-bit parameter");
    segment.m = momentum ? stream(kMomentum, &theta_type) : nullptr;
    segment.z = momentum ? stream(kDifference, &theta_type) : nullptr;
    segment.previous = momentum ? stream(kPrevious, &theta_type) : nullptr;
    const bool sampled = every_average || samplings[segment.sampling].sample != 0;
    segment.a = sampled ? stream(kAverage, &a_type) : nullptr;
    segment.a_dtype = segment.a ? dtype_of(a_type) : segment.theta_dtype;
    STD_TORCH_CHECK(segment.a_dtype == segment.theta_dtype ||
                        (segment.a_dtype == Dtype::kFloat32 && type.bits == 16),
                    "step_: the average of segment ", i,
                    " must have the parameter's dtype, or float32 for a 16-bit parameter");

    const int64_t* sizes = all_shapes + column[kShape];
    const bool same_dtype = static_cast<int64_t>(segment.dtype) == column[kDtype];
    STD_TORCH_CHECK(
        same_dtype && numel_of(param) == segment.length &&
            (param.data != nullptr || segment.length == 0) &&
            fits(param, device, type, sizes, dims, segment.length),
        "step_: parameter ", i,
        " differs from what its segment was made for in dtype, device, shape or layout");
    const View& grad = tables.grads[i];
    segment.g = nullptr;
    if (grad.dtype.bits == 0) continue;
    STD_TORCH_CHECK(fits(grad, device, type, sizes, dims, segment.length), "step_: gradient ", i,
                    " differs from its parameter in dtype, device, shape or layout");
    STD_TORCH_CHECK(!momentum || segment.m != nullptr || segment.length == 0, "step_: segment ", i,
                    " has momentum and no momentum buffer");
    STD_TORCH_CHECK((segment.z == nullptr) == (segment.previous == nullptr), "step_: segment ", i,
                    " needs both buffers of the difference or neither");
    STD_TORCH_CHECK(grad.data != nullptr || segment.length == 0, "step_: gradient ", i,
                    " has no memory");
    segment.g = grad.data;
  }
  return result;
}

static DLDataType type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    case ScalarType::BFloat16:
      return {kDLBfloat, 16, 1};
    case ScalarType::Half:
      return {kDLFloat, 16, 1};
    case ScalarType::Int:
      return kInt32;
    case ScalarType::Long:
      return kInt64;
    default:
      return {kDLOpaqueHandle, 8, 1};
  }
}

View view_of(const Tensor& tensor) {
  View view{};
  view.data = tensor.data_ptr();
  const bool cuda = tensor.is_cuda();
  view.device = {cuda              ? kDLCUDA
                 : tensor.is_cpu() ? kDLCPU
                                   : kDLExtDev,
                 cuda ? static_cast<int32_t>(tensor.get_device()) : 0};
  view.ndim = static_cast<int32_t>(tensor.dim());
  view.dtype = type_of(tensor.scalar_type());
  view.shape = const_cast<int64_t*>(tensor.sizes().data());
  view.strides = const_cast<int64_t*>(tensor.strides().data());
  return view;
}

View view_of(const std::optional<Tensor>& tensor) { return tensor ? view_of(*tensor) : View{}; }
