// The part of DLPack's C interface (version 1.x, https://dmlc.github.io/dlpack) that the operators
// use: a view of a tensor, and the table by which a framework fills one from its Python objects.
// torch ships the full header but not for extensions of the stable ABI; the layout is fixed by
// DLPack.
#pragma once

#include <cstdint>

extern "C" {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2, kDLExtDev = 12 };

enum DLDataTypeCode : uint8_t { kDLInt = 0, kDLFloat = 2, kDLOpaqueHandle = 3, kDLBfloat = 4 };

struct DLDevice {
  DLDeviceType device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous_api;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  // Fills a view that borrows from the Python object; nonzero with a Python error set on failure.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* view);
  void (*current_work_stream)();
};

}  // extern "C"
