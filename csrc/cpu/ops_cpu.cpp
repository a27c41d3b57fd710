// The operators rbwa_fused::step_ and rbwa_fused::pull_ on the CPU, and the Python module with the
// facts of this build. tables.cpp checks everything before anything is changed.
//
// `step_` has two doors to the same function. The operator is the one that the dispatcher, the
// profiler and torch.compile know. The Python module's `step` reads the tensors through DLPack's
// exchange table instead, 0.02 us a tensor against 0.12 (62 gradients, torch 2.15, 2 cores of an
// AMD EPYC 9005, 2026-11), and those of its tables once.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "gradients.h"
#include "held.h"
#include "in_turn.h"
#include "python_tensors.h"
#include "replica_tables.h"
#include "step.h"
#include "summed.h"
#include "tables.h"

namespace {

namespace py = pybind11;
using torch::stable::Tensor;

constexpr DLDevice kCpu{kDLCPU, 0};

// `clip` is a float64 that multiplies the gradients, or absent.
void step(const std::vector<View>& params, const std::vector<View>& grads, const Tables& tables,
          const View& clip) {
  std::vector<Further> further;
  const std::vector<Segment> segments = resolve(params, grads, tables, kCpu, further);
  const Row* rows = static_cast<const Row*>(tables.rows.data);
  std::vector<Row> clipped;
  if (clip.dtype.bits != 0) {
    STD_TORCH_CHECK(numel_of(clip) == 1, "step_: `clip` must be one number");
    const double coefficient = *table_of<double>(clip, kDouble, "clip");
    clipped.assign(rows, rows + numel_of(tables.rows) / kRowColumns);
    for (Row& row : clipped) row.numbers.s *= coefficient;
    rows = clipped.data();
  }
  step_cpu(segments.data(), static_cast<int64_t>(segments.size()), rows,
           static_cast<const Sampling*>(tables.samplings.data));
  grow(segments, tables);
}

// ---- the operators -----------------------------------------------------------------------------

void step_op(std::vector<Tensor> params, std::vector<std::optional<Tensor>> grads,
             std::vector<Tensor> state, Tensor segments, Tensor shapes, Tensor ages, Tensor rows,
             Tensor samplings, std::optional<Tensor> clip, std::optional<Tensor> further) {
  step(views_of(params), views_of(grads),
       {views_of(state), view_of(segments), view_of(shapes), view_of(ages), view_of(rows),
        view_of(samplings), view_of(further)},
       view_of(clip));
}

void sum_squares(const std::vector<View>& grads, const View& sums) {
  const std::vector<Summed> checked = summed(grads, sums, kCpu);
  sum_squares_cpu(checked, static_cast<double*>(sums.data));
}

void sum_squares_op(std::vector<Tensor> grads, Tensor sums) {
  sum_squares(views_of(grads), view_of(sums));
}

void pull_op(std::vector<Tensor> params, int64_t replicas, double alpha) {
  pull_cpu(replicated(views_of(params), replicas, alpha, kCpu), {1.0 / replicas, alpha});
}

// ---- the Python module -------------------------------------------------------------------------

void step_python(const PythonTables& fixed, const py::list& params, const py::list& grads,
                 py::handle clip) {
  const std::vector<View> of_params = views_of(params), of_grads = views_of(grads);
  const View of_clip = view_of(clip);
  const py::gil_scoped_release release;
  step(of_params, of_grads, fixed.tables, of_clip);
}

void sum_squares_python(const py::list& grads, py::handle sums) {
  const std::vector<View> of_grads = views_of(grads);
  const View of_sums = view_of(sums);
  const py::gil_scoped_release release;
  sum_squares(of_grads, of_sums);
}

}  // namespace

STABLE_TORCH_LIBRARY(rbwa_fused, library) {
  library.def(
      "step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] state, Tensor segments, "
      "Tensor shapes, Tensor(c!) ages, Tensor rows, Tensor samplings, Tensor? clip=None, "
      "Tensor? further=None) -> ()");
  library.def("sum_squares_(Tensor[] grads, Tensor(a!) sums) -> ()");
  library.def("pull_(Tensor(a!)[] params, int replicas, float alpha) -> ()");
  library.def("hand_over(Tensor[] tensors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rbwa_fused, CPU, library) {
  library.impl("step_", TORCH_BOX(&step_op));
  library.impl("sum_squares_", TORCH_BOX(&sum_squares_op));
  library.impl("pull_", TORCH_BOX(&pull_op));
}

STABLE_TORCH_LIBRARY_IMPL(rbwa_fused, CompositeExplicitAutograd, library) {
  library.impl("hand_over", TORCH_BOX(&held::hand_over));
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts of this build; importing it registers torch.ops.rbwa_fused.";
#if defined(__GNUC__) && !defined(__clang__)
  module.attr("COMPILER") = "gcc " __VERSION__;
#else
  module.attr("COMPILER") = __VERSION__;  // clang's names it
#endif
  module.attr("ROW_COLUMNS") = kRowColumns;
  module.attr("SAMPLING_COLUMNS") = kSamplingColumns;
  module.attr("SEGMENT_COLUMNS") = static_cast<int>(kSegmentColumns);
  module.def("cpu_capability", &cpu_capability,
             "The instruction set in use: 'baseline', 'avx2' or 'avx512'.");
  module.def("set_cpu_capability", &set_cpu_capability, py::arg("name"),
             "Use another instruction set; False if this processor or build lacks it.");
  gradients::find();
  module.def("in_turn", &in_turn::call, "See engine/doors.py.");
  module.def("gradients", &gradients::gather, "See engine/doors.py.");
  py::class_<held::State>(module, "HeldState", "See engine/held.py.")
      .def(py::init<py::dict, const py::list&, int64_t>())
      .def("stands", &held::State::stands);
  if (find_exchange_table()) {
    py::class_<PythonTables>(module, "Tables", "The tables of a launch as the kernels see them.")
        .def(py::init<py::list, py::object, py::object, py::object, py::object, py::object,
                      py::object>(),
             py::arg("state"), py::arg("segments"), py::arg("shapes"), py::arg("ages"),
             py::arg("rows"), py::arg("samplings"), py::arg("further") = py::none());
    module.def("step", &step_python, py::arg("tables"), py::arg("params"), py::arg("grads"),
               py::arg("clip") = py::none(), "torch.ops.rbwa_fused.step_ without the dispatcher.");
    module.def("sum_squares", &sum_squares_python,
               "torch.ops.rbwa_fused.sum_squares_ without the dispatcher.");
  }
}
