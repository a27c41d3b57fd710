// Python tensors as views, by torch's own DLPack table: no allocation, no dispatcher.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "tables.h"

// Null where this torch has no such table.
inline const DLPackExchangeAPI* exchange_table = nullptr;

inline View view_of(pybind11::handle tensor) {
  View view{};
  if (!tensor.is_none() && exchange_table->dltensor_from_py_object_no_sync(tensor.ptr(), &view)) {
    throw pybind11::error_already_set();
  }
  return view;
}

inline std::vector<View> views_of(const pybind11::list& tensors) {
  std::vector<View> views;
  views.reserve(tensors.size());
  for (pybind11::handle tensor : tensors) views.push_back(view_of(tensor));
  return views;
}

// Views of tensors that stay what they are: they are taken once, and the tensors kept.
class Views {
 public:
  explicit Views(pybind11::list tensors) : views(views_of(tensors)), tensors_(std::move(tensors)) {}
  const std::vector<View> views;

 private:
  pybind11::list tensors_;
};

// The state of a step: views that were taken once, or a list of tensors.
inline std::vector<View> views_of_state(pybind11::handle state) {
  if (!PyList_Check(state.ptr())) return state.cast<const Views&>().views;
  return views_of(pybind11::reinterpret_borrow<pybind11::list>(state));
}

inline bool find_exchange_table() {
  const pybind11::object tensor = pybind11::module_::import("torch").attr("Tensor");
  if (!pybind11::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
  const pybind11::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* table = capsule.get_pointer<const DLPackExchangeAPI>();
  if (table->version.major != 1 || table->dltensor_from_py_object_no_sync == nullptr) {
    return false;
  }
  exchange_table = table;
  return true;
}
