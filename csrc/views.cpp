#include "views.h"

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

Dtype dtype_of(DLDataType type) {
#define RBWA_CASE(name, storage, code, bits, torchs) \
  if (same(type, {code, bits, 1})) return Dtype::name;
  RBWA_DTYPES(RBWA_CASE)
#undef RBWA_CASE
  STD_TORCH_CHECK(false, "parameters must be float32, float64, bfloat16 or float16");
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

static DLDataType type_of(ScalarType type) {
  switch (type) {
#define RBWA_CASE(name, storage, code, bits, torchs) \
  case ScalarType::torchs:                           \
    return {code, bits, 1};
    RBWA_DTYPES(RBWA_CASE)
#undef RBWA_CASE
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
