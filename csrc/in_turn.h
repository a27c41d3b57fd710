// Functions in C, called one after the other while Python runs nothing of its own.
#pragma once

#include <pybind11/pybind11.h>

namespace in_turn {

namespace py = pybind11;

// Autograd records nothing for as long as it lives.
class NoGrad {
 public:
  NoGrad() : enabled_(enabled()().ptr() == Py_True) { enable()(false); }
  ~NoGrad() {
    const py::error_scope raised;  // by whoever leaves
    enable()(enabled_);
  }

 private:
  static const py::object& enabled() {
    static const py::object* function =
        new py::object(py::module_::import("torch").attr("is_grad_enabled"));
    return *function;
  }
  static const py::object& enable() {
    static const py::object* function =
        new py::object(py::module_::import("torch._C").attr("_set_grad_enabled"));
    return *function;
  }
  bool enabled_;
};

// Calls one function after the other, each given as a tuple with its arguments, without autograd.
// Python runs signal handlers between its own instructions only, so an interrupt comes before the
// first call or behind the last, if all of them are functions in C.
inline void call(const py::list& calls) {
  const NoGrad no_grad;
  for (py::handle call : calls) {
    PyObject* const* items = &PyTuple_GET_ITEM(call.ptr(), 0);
    const auto count = static_cast<size_t>(PyTuple_GET_SIZE(call.ptr()));
    PyObject* result = PyObject_Vectorcall(items[0], items + 1, count - 1, nullptr);
    if (result == nullptr) throw py::error_already_set();
    Py_DECREF(result);
  }
}

}  // namespace in_turn
