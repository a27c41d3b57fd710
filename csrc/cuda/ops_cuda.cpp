// The operators on CUDA devices, and the Python module with the facts of this build. As in
// cpu/ops_cpu.cpp there are two doors to one function, the dispatcher's and the module's own.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cuda/device_tables.h"
#include "cuda/kernel.h"
#include "cuda/packer.h"
#include "cuda/pull_cuda.h"
#include "python_tensors.h"
#include "replica_tables.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

namespace py = pybind11;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

void* current_stream(DLDevice device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.device_id, &stream));
  return stream;
}

using Views = std::vector<View>;

void step(const Views& params, const Views& grads, const Tables& tables, const DeviceTables& own) {
  if (params.empty()) return;
  const DLDevice device = params[0].device;
  STD_TORCH_CHECK(device.device_type == kDLCUDA, "step_: the parameters are not on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device.device_id);
  step_on(params, grads, tables, own, device, current_stream(device));
}

void advance(const CountTables& tables) {
  const DLDevice device = tables.counts.device;
  STD_TORCH_CHECK(device.device_type == kDLCUDA, "advance_: the counters are not on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device.device_id);
  advance_on(tables, device, current_stream(device));
}

// ---- the operators -----------------------------------------------------------------------------

void step_op(Tensors params, std::vector<Optional> grads, Tensors state, Tensor segments,
             Tensor shapes, Tensor ages, Tensor rows, Tensor samplings, Optional clip,
             Optional further) {
  DeviceTables own{};
  own.clip = view_of(clip);
  step(views_of(params), views_of(grads),
       {views_of(state), view_of(segments), view_of(shapes), view_of(ages), view_of(rows),
        view_of(samplings), view_of(further)},
       own);
}

void sum_squares(const Views& grads, const View& sums) {
  const DLDevice device = sums.device;
  STD_TORCH_CHECK(device.device_type == kDLCUDA, "sum_squares_: `sums` is not on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device.device_id);
  sum_squares_on(grads, sums, device, current_stream(device));
}

void sum_squares_op(Tensors grads, Tensor sums) { sum_squares(views_of(grads), view_of(sums)); }

void step_deferred_op(Tensors params, std::vector<Optional> grads, Tensors state, Tensor segments,
                      Tensor shapes, Tensor ages, Tensor rows, Tensor samplings,
                      std::vector<Optional> lrs, Tensor samplings64, Tensor samplings32,
                      Tensor marks, Tensor agings, Optional grad_scale, Optional found_inf,
                      Optional clip, Optional settings, Optional schedules, Optional further) {
  step(views_of(params), views_of(grads),
       {views_of(state), view_of(segments), view_of(shapes), view_of(ages), view_of(rows),
        view_of(samplings), view_of(further)},
       {views_of(lrs), view_of(samplings64), view_of(samplings32), view_of(marks), view_of(agings),
        view_of(grad_scale), view_of(found_inf), view_of(clip), view_of(settings),
        view_of(schedules)});
}

void advance_op(Tensor counts, Tensor policies, Tensor samplings64, Tensor samplings32,
                Tensor marks, Optional found_inf, Optional schedules) {
  advance({view_of(counts), view_of(policies), view_of(samplings64), view_of(samplings32),
           view_of(marks), view_of(found_inf), view_of(schedules)});
}

void pull_op(Tensors params, int64_t replicas, double alpha) {
  if (params.empty()) return;
  STD_TORCH_CHECK(replicas <= kMostReplicas, "pull_: ", replicas, " replicas, more than ",
                  kMostReplicas);
  const DLDevice device = view_of(params[0]).device;
  STD_TORCH_CHECK(device.device_type == kDLCUDA, "pull_: parameter 0 is not on a CUDA device");
  const std::vector<Replicated> checked = replicated(views_of(params), replicas, alpha, device);
  const torch::stable::accelerator::DeviceGuard guard(device.device_id);
  const char* error = pull_in_launches(checked, {1.0 / replicas, alpha}, current_stream(device));
  STD_TORCH_CHECK(error == nullptr, "pull_: ", error);
}

// ---- the Python module -------------------------------------------------------------------------

void step_python(const PythonTables& fixed, const py::list& params, const py::list& grads,
                 py::handle clip) {
  const Views of_params = views_of(params), of_grads = views_of(grads);
  DeviceTables own{};
  own.clip = view_of(clip);
  const py::gil_scoped_release release;
  step(of_params, of_grads, fixed.tables, own);
}

void sum_squares_python(const py::list& grads, py::handle sums) {
  const Views of_grads = views_of(grads);
  const View of_sums = view_of(sums);
  const py::gil_scoped_release release;
  sum_squares(of_grads, of_sums);
}

void step_deferred_python(const PythonTables& fixed, const py::list& params, const py::list& grads,
                          const py::list& lrs, py::handle samplings64, py::handle samplings32,
                          py::handle marks, py::handle agings, py::handle grad_scale,
                          py::handle found_inf, py::handle clip, py::handle settings,
                          py::handle schedules) {
  const Views of_params = views_of(params), of_grads = views_of(grads);
  const DeviceTables own{views_of(lrs),      view_of(samplings64), view_of(samplings32),
                         view_of(marks),     view_of(agings),      view_of(grad_scale),
                         view_of(found_inf), view_of(clip),        view_of(settings),
                         view_of(schedules)};
  const py::gil_scoped_release release;
  step(of_params, of_grads, fixed.tables, own);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rbwa_fused, library) {
  library.def(
      "step_deferred_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] state, Tensor segments, "
      "Tensor shapes, Tensor(c!) ages, Tensor rows, Tensor samplings, Tensor?[] lrs, "
      "Tensor samplings64, Tensor samplings32, Tensor(d!) marks, Tensor(e!) agings, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor? clip=None, Tensor? settings=None, "
      "Tensor(f!)? schedules=None, Tensor? further=None) -> ()");
  library.def(
      "advance_(Tensor(a!) counts, Tensor policies, Tensor(b!) samplings64, "
      "Tensor(c!) samplings32, Tensor(d!) marks, Tensor? found_inf, Tensor(e!)? schedules=None) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rbwa_fused, CUDA, library) {
  library.impl("step_", TORCH_BOX(&step_op));
  library.impl("step_deferred_", TORCH_BOX(&step_deferred_op));
  library.impl("advance_", TORCH_BOX(&advance_op));
  library.impl("sum_squares_", TORCH_BOX(&sum_squares_op));
  library.impl("pull_", TORCH_BOX(&pull_op));
}

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "The CUDA kernels; importing it registers them with torch.ops.rbwa_fused.";
  module.attr("ARCHITECTURES") = RBWA_ARCHITECTURES;
  module.attr("TOOLKIT") = cuda_toolkit();
  module.attr("POLICY_COLUMNS") = kPolicyColumns;
  module.def(
      "launch_form", [](bool small, bool block_table) { launch_form = {small, block_table}; },
      "How steps are launched from now on, for benchmarks (csrc/cuda/packer.h).");
  if (find_exchange_table()) {
    module.def("step", &step_python, "torch.ops.rbwa_fused.step_ without the dispatcher.");
    module.def("sum_squares", &sum_squares_python,
               "torch.ops.rbwa_fused.sum_squares_ without the dispatcher.");
    module.def("step_deferred", &step_deferred_python,
               "torch.ops.rbwa_fused.step_deferred_ without the dispatcher.");
  }
}
