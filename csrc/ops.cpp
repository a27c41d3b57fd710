// The operators rbwa_fused::step_ and rbwa_fused::exchange_: schema, checks, and the Python module
// with the facts of this build. Everything is checked here, before anything is changed; a kernel
// trusts the segments it is given.
//
// `step_` has two doors to the same function. The operator is the one that the dispatcher, the
// profiler and torch.compile know. The Python module's `step` reads the tensors through DLPack's
// exchange table instead, 0.02 us a tensor against 0.12 (62 gradients, torch 2.15, 2 cores of an
// AMD EPYC 9005, 2026-11).

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "dlpack.h"
#include "step.h"

namespace {

namespace py = pybind11;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns of the segment table, which flat.py writes. A stream is a pair: which of the `state`
// buffers holds it (-1: none does) and the element at which it starts.
enum SegmentColumn {
  kLength,  // elements
  kRow,     // of the coefficient tables
  kSampling,
  kShape,  // where this segment's sizes, then its strides, start in `shapes`
  kDims,
  kDtype,  // of the parameter, as in step.h
  kMomentum,
  kAverage = kMomentum + 2,
  kDifference = kAverage + 2,
  kPrevious = kDifference + 2,
  kSegmentColumns = kPrevious + 2,
};

// A tensor as the checks see it. dtype.bits is 0 for an absent gradient.
using View = DLTensor;

constexpr DLDataType kInt64{kDLInt, 64, 1};
constexpr DLDataType kDouble{kDLFloat, 64, 1};
constexpr DLDataType kFloat{kDLFloat, 32, 1};

bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits; }

int64_t numel_of(const View& view) {
  int64_t numel = 1;
  for (int32_t d = 0; d < view.ndim; ++d) numel *= view.shape[d];
  return numel;
}

template <typename T>
const T* table_of(const View& view, DLDataType type, const char* name) {
  STD_TORCH_CHECK(same(view.dtype, type) && view.device.device_type == kDLCPU &&
                      (view.ndim == 0 || view.strides[view.ndim - 1] == 1),
                  "step_: `", name, "` must be a contiguous CPU table of the documented dtype");
  return static_cast<const T*>(view.data);
}

Dtype dtype_of(DLDataType type) {
  if (same(type, kFloat)) return Dtype::kFloat32;
  if (same(type, kDouble)) return Dtype::kFloat64;
  STD_TORCH_CHECK(type.bits == 16 && (type.code == kDLBfloat || type.code == kDLFloat),
                  "step_: parameters must be float32, float64, bfloat16 or float16");
  return type.code == kDLBfloat ? Dtype::kBfloat16 : Dtype::kFloat16;
}

// Whether a tensor has the dtype, shape and layout that its segment was made for. A size of 1 has
// no meaningful stride, a tensor without elements no layout.
bool fits(const View& view, DLDataType type, const int64_t* sizes, int64_t dims, int64_t length) {
  if (!same(view.dtype, type) || view.device.device_type != kDLCPU || view.ndim != dims) {
    return false;
  }
  const int64_t* strides = sizes + dims;
  for (int64_t d = 0; d < dims; ++d) {
    if (view.shape[d] != sizes[d]) return false;
    if (view.strides[d] != strides[d] && sizes[d] != 1 && length != 0) return false;
  }
  return true;
}

struct Tables {
  std::vector<View> params, grads, state;
  View segments, shapes, rows, samplings;
};

// Turns the tables into segments with addresses, or throws.
std::vector<Segment> resolve(const Tables& tables) {
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
  std::vector<int64_t> numel(state_count);
  std::transform(tables.state.begin(), tables.state.end(), numel.begin(), numel_of);

  std::vector<Segment> result(count);
  for (int64_t i = 0; i < count; ++i, column += kSegmentColumns) {
    Segment& segment = result[i];
    segment.length = column[kLength];
    segment.row = column[kRow];
    segment.sampling = column[kSampling];
    const int64_t dims = column[kDims];
    STD_TORCH_CHECK(segment.row >= 0 && segment.row < row_count && segment.sampling >= 0 &&
                        segment.sampling < sampling_count && segment.length >= 0 && dims >= 0 &&
                        column[kShape] >= 0 && column[kShape] + 2 * dims <= shape_count,
                    "step_: segment ", i, " points outside its tables");
    auto stream = [&](SegmentColumn which, DLDataType* type) -> void* {
      const int64_t index = column[which];
      const int64_t offset = column[which + 1];
      if (index == -1) return nullptr;
      STD_TORCH_CHECK(index >= 0 && index < state_count && offset >= 0 &&
                          offset + segment.length <= numel[index],
                      "step_: segment ", i, " points outside its buffer");
      const View& buffer = tables.state[index];
      STD_TORCH_CHECK(type->bits == 0 || same(buffer.dtype, *type),
                      "step_: the streams of segment ", i, " differ in dtype");
      *type = buffer.dtype;
      return static_cast<char*>(buffer.data) + offset * (buffer.dtype.bits / 8);
    };
    const bool momentum = rows[segment.row].mu != 0;
    const View& param = tables.params[i];
    DLDataType type = param.dtype;
    DLDataType a_type{};
    segment.dtype = dtype_of(type);
    segment.theta = param.data;
    segment.m = momentum ? stream(kMomentum, &type) : nullptr;
    segment.z = momentum ? stream(kDifference, &type) : nullptr;
    segment.previous = momentum ? stream(kPrevious, &type) : nullptr;
    segment.a = samplings[segment.sampling].sample != 0 ? stream(kAverage, &a_type) : nullptr;
    segment.a_dtype = segment.a ? dtype_of(a_type) : segment.dtype;
    STD_TORCH_CHECK(
        segment.a_dtype == segment.dtype || (segment.a_dtype == Dtype::kFloat32 && type.bits == 16),
        "step_: the average of segment ", i,
        " must have the parameter's dtype, or float32 for a 16-bit parameter");

    const int64_t* sizes = all_shapes + column[kShape];
    const bool same_dtype = static_cast<int64_t>(segment.dtype) == column[kDtype];
    STD_TORCH_CHECK(
        same_dtype && fits(param, type, sizes, dims, segment.length), "step_: parameter ", i,
        " differs from what its segment was made for in dtype, device, shape or layout");
    const View& grad = tables.grads[i];
    segment.g = nullptr;
    if (grad.dtype.bits == 0) continue;
    STD_TORCH_CHECK(fits(grad, type, sizes, dims, segment.length), "step_: gradient ", i,
                    " differs from its parameter in dtype, device, shape or layout");
    STD_TORCH_CHECK(!momentum || segment.m != nullptr || segment.length == 0, "step_: segment ", i,
                    " has momentum and no momentum buffer");
    STD_TORCH_CHECK((segment.z == nullptr) == (segment.previous == nullptr), "step_: segment ", i,
                    " needs both buffers of the difference or neither");
    segment.g = grad.data;
  }
  return result;
}

void step(const Tables& tables) {
  const std::vector<Segment> segments = resolve(tables);
  step_cpu(segments.data(), static_cast<int64_t>(segments.size()),
           static_cast<const Row*>(tables.rows.data),
           static_cast<const Sampling*>(tables.samplings.data));
}

// ---- the operators -----------------------------------------------------------------------------

DLDataType type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::Double:
      return kDouble;
    case ScalarType::BFloat16:
      return {kDLBfloat, 16, 1};
    case ScalarType::Half:
      return {kDLFloat, 16, 1};
    case ScalarType::Long:
      return kInt64;
    default:
      return {kDLOpaqueHandle, 8, 1};
  }
}

View view_of(const Tensor& tensor) {
  View view{};
  view.data = tensor.data_ptr();
  view.device = {tensor.is_cpu() ? kDLCPU : kDLExtDev, 0};
  view.ndim = static_cast<int32_t>(tensor.dim());
  view.dtype = type_of(tensor.scalar_type());
  view.shape = const_cast<int64_t*>(tensor.sizes().data());
  view.strides = const_cast<int64_t*>(tensor.strides().data());
  return view;
}

View view_of(const std::optional<Tensor>& tensor) { return tensor ? view_of(*tensor) : View{}; }

template <typename T>
std::vector<View> views_of(const std::vector<T>& tensors) {
  std::vector<View> views;
  views.reserve(tensors.size());
  for (const T& tensor : tensors) views.push_back(view_of(tensor));
  return views;
}

void step_op(std::vector<Tensor> params, std::vector<std::optional<Tensor>> grads,
             std::vector<Tensor> state, Tensor segments, Tensor shapes, Tensor rows,
             Tensor samplings) {
  step({views_of(params), views_of(grads), views_of(state), view_of(segments), view_of(shapes),
        view_of(rows), view_of(samplings)});
}

void exchange_op(std::vector<Tensor> a, std::vector<Tensor> b) {
  STD_TORCH_CHECK(a.size() == b.size(), "exchange_: ", a.size(), " tensors against ", b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    const View left = view_of(a[i]);
    STD_TORCH_CHECK(fits(view_of(b[i]), left.dtype, left.shape, left.ndim, 0) && a[i].is_cpu(),
                    "exchange_: the tensors of pair ", i, " differ in device, dtype or shape");
  }
  for (size_t i = 0; i < a.size(); ++i) {
    const View left = view_of(a[i]);
    exchange_cpu(left.data, b[i].data_ptr(), numel_of(left) * (left.dtype.bits / 8));
  }
}

// ---- the Python module -------------------------------------------------------------------------

// torch's own way from a Python tensor to a DLTensor, without allocation; null before torch had it.
const DLPackExchangeAPI* exchange_table = nullptr;

View view_of(py::handle tensor) {
  View view{};
  if (!tensor.is_none() && exchange_table->dltensor_from_py_object_no_sync(tensor.ptr(), &view)) {
    throw py::error_already_set();
  }
  return view;
}

std::vector<View> views_of(const py::list& tensors) {
  std::vector<View> views;
  views.reserve(tensors.size());
  for (py::handle tensor : tensors) views.push_back(view_of(tensor));
  return views;
}

void step_python(const py::list& params, const py::list& grads, const py::list& state,
                 py::handle segments, py::handle shapes, py::handle rows, py::handle samplings) {
  const Tables tables{views_of(params), views_of(grads), views_of(state),   view_of(segments),
                      view_of(shapes),  view_of(rows),   view_of(samplings)};
  const py::gil_scoped_release release;
  step(tables);
}

bool find_exchange_table() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
  const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* table = capsule.get_pointer<const DLPackExchangeAPI>();
  if (table->version.major != 1 || table->dltensor_from_py_object_no_sync == nullptr) {
    return false;
  }
  exchange_table = table;
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY(rbwa_fused, library) {
  library.def(
      "step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] state, Tensor segments, "
      "Tensor shapes, Tensor rows, Tensor samplings) -> ()");
  library.def("exchange_(Tensor(a!)[] a, Tensor(b!)[] b) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rbwa_fused, CPU, library) {
  library.impl("step_", TORCH_BOX(&step_op));
  library.impl("exchange_", TORCH_BOX(&exchange_op));
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts of this build; importing it registers torch.ops.rbwa_fused.";
  module.attr("COMPILER") = __VERSION__;
  module.attr("ROW_COLUMNS") = kRowColumns;
  module.attr("SAMPLING_COLUMNS") = kSamplingColumns;
  module.attr("SEGMENT_COLUMNS") = static_cast<int>(kSegmentColumns);
  module.def("cpu_capability", &cpu_capability,
             "The instruction set in use: 'baseline', 'avx2' or 'avx512'.");
  module.def("set_cpu_capability", &set_cpu_capability, py::arg("name"),
             "Use another instruction set; False if this processor or build lacks it.");
  if (find_exchange_table()) {
    module.def("step", &step_python, "torch.ops.rbwa_fused.step_ without the dispatcher.");
  }
}
