// What an optimizer's state held when tables were made for it, and whether it holds that still.
//
// `opt.state` is a dict of dicts that anybody may write to, and its tensors may be given other
// memory. So every step looks at all of it, by identity and address.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

namespace held {

namespace py = pybind11;
using torch::stable::Tensor;

// Tensors on their way from the dispatcher, which alone gives handles of them, to a State.
inline std::unordered_map<int64_t, std::vector<Tensor>> handed_over;

inline int64_t hand_over(std::vector<Tensor> tensors) {
  static int64_t number = 0;  // the GIL is held
  handed_over.emplace(++number, std::move(tensors));
  return number;
}

class State {
 public:
  // `tensors` are those values of the parameters' dicts whose memory a kernel is given, in the
  // order of the dicts, and `number` tells where their handles are.
  State(py::dict state, const py::list& tensors, int64_t number) : state_(std::move(state)) {
    if (auto found = handed_over.extract(number)) handles_ = std::move(found.mapped());
    if (handles_.size() != tensors.size()) {
      throw std::invalid_argument("held.State: no handles of these tensors");
    }
    size_t next = 0;
    for (auto [param, dict] : state_) {
      params_.push_back({py::reinterpret_borrow<py::object>(param),
                         py::reinterpret_borrow<py::object>(dict), PyDict_Check(dict.ptr()) != 0,
                         0});
      if (!params_.back().is_dict) continue;
      for (auto [key, value] : py::reinterpret_borrow<py::dict>(dict)) {
        Value own{py::reinterpret_borrow<py::object>(key),
                  py::reinterpret_borrow<py::object>(value), -1, nullptr, 0};
        if (next < tensors.size() && value.ptr() == PyList_GET_ITEM(tensors.ptr(), next)) {
          own.handle = static_cast<int64_t>(next++);
          const Tensor& tensor = handles_[own.handle];
          own.data = tensor.data_ptr();
          own.numel = tensor.numel();
        }
        values_.push_back(std::move(own));
        ++params_.back().count;
      }
    }
    if (next != tensors.size()) {
      throw std::invalid_argument("held.State: a tensor is not in the state, in this order");
    }
  }

  // Whether this is the mapping, with the same objects in it and the same memory in those.
  bool stands(py::handle state) const {
    if (state.ptr() != state_.ptr()) return false;
    if (PyDict_GET_SIZE(state_.ptr()) != static_cast<Py_ssize_t>(params_.size())) return false;
    const Value* next = values_.data();
    const Param* expected = params_.data();
    Py_ssize_t at = 0;
    PyObject *param, *dict;
    while (PyDict_Next(state_.ptr(), &at, &param, &dict)) {
      if (param != expected->param.ptr() || dict != expected->dict.ptr()) return false;
      if (expected->is_dict && !holds(*expected, dict, next)) return false;
      next += expected->count;
      ++expected;
    }
    return true;
  }

 private:
  struct Param {
    py::object param, dict;
    bool is_dict;
    Py_ssize_t count;  // of values in the dict
  };
  struct Value {
    py::object key, value;
    int64_t handle;  // -1: no tensor whose memory a kernel is given
    void* data;
    int64_t numel;
  };

  bool holds(const Param& expected, PyObject* dict, const Value* next) const {
    if (PyDict_GET_SIZE(dict) != expected.count) return false;
    Py_ssize_t at = 0;
    PyObject *key, *value;
    while (PyDict_Next(dict, &at, &key, &value)) {
      if (key != next->key.ptr() || value != next->value.ptr()) return false;
      if (next->handle >= 0) {
        const Tensor& tensor = handles_[next->handle];
        if (tensor.data_ptr() != next->data || tensor.numel() != next->numel) return false;
      }
      ++next;
    }
    return true;
  }

  py::dict state_;
  std::vector<Param> params_;
  std::vector<Value> values_;
  std::vector<Tensor> handles_;
};

}  // namespace held
