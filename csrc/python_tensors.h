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

// The tables of a launch, whose tensors stay what they are: they are viewed once, and kept.
class PythonTables {
 public:
  PythonTables(pybind11::list state, pybind11::object segments, pybind11::object shapes,
               pybind11::object ages, pybind11::object rows, pybind11::object samplings,
               pybind11::object further)
      : tables{views_of(state), view_of(segments),  view_of(shapes), view_of(ages),
               view_of(rows),   view_of(samplings), view_of(further)},
        kept_(pybind11::make_tuple(state, segments, shapes, ages, rows, samplings, further)) {}
  const Tables tables;

 private:
  pybind11::tuple kept_;
};

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
