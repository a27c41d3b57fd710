#include "cuda/device_tables.h"

#include "cuda/norm_cuda.h"
#include "cuda/packer.h"
#include "policy.h"
#include "summed.h"

namespace {

// The memory of a contiguous table on the device, of at least so many elements; null if absent.
template <typename T>
T* on_device(const View& view, DLDevice device, DLDataType type, int64_t elements,
             const char* name) {
  if (view.dtype.bits == 0) return nullptr;
  STD_TORCH_CHECK(same(view.device, device) && same(view.dtype, type) &&
                      numel_of(view) >= elements && is_contiguous(view),
                  "step_: `", name,
                  "` must be a contiguous table of the documented dtype and size ",
                  "on the parameters' device");
  return static_cast<T*>(view.data);
}

}  // namespace

void step_on(const std::vector<View>& params, const std::vector<View>& grads, const Tables& tables,
             const DeviceTables& own, DLDevice device, void* stream) {
  const bool device_counts = own.marks.dtype.bits != 0;
  std::vector<Further> further;
  const auto segments = resolve(params, grads, tables, device, further, device_counts);
  const int64_t group_count = numel_of(tables.rows) / kRowColumns / kRowsPerGroup;
  CudaStep step{};
  step.rows = static_cast<const Row*>(tables.rows.data);
  step.samplings = static_cast<const Sampling*>(tables.samplings.data);
  const int64_t samplings = numel_of(tables.samplings);
  STD_TORCH_CHECK(kRowsPerGroup * group_count * kRowColumns == numel_of(tables.rows) &&
                      samplings / kSamplingColumns < (1 << 16),
                  "step_: two rows a param group, and at most 65,535 samplings");
  step.lrs.assign(group_count, nullptr);
  STD_TORCH_CHECK(own.lrs.empty() || static_cast<int64_t>(own.lrs.size()) == group_count,
                  "step_: ", own.lrs.size(), " learning rates for ", group_count, " groups");
  for (size_t i = 0; i < own.lrs.size(); ++i) {
    step.lrs[i] = on_device<const float>(own.lrs[i], device, kFloat, 1, "lrs");
  }
  const int64_t marks = 2 * static_cast<int64_t>(segments.size());
  step.device_samplings =
      on_device<const double>(own.samplings, device, kDouble, samplings, "samplings64");
  step.device_samplings_float =
      on_device<const float>(own.samplings_float, device, kFloat, samplings, "samplings32");
  step.marks = on_device<int32_t>(own.marks, device, kInt32, marks, "marks");
  const int64_t agings = sizeof(Aging<double>) / sizeof(double) * segments.size();
  step.agings = on_device<double>(own.agings, device, kDouble, agings, "agings");
  step.grad_scale = on_device<const float>(own.grad_scale, device, kFloat, 1, "grad_scale");
  step.found_inf = on_device<const float>(own.found_inf, device, kFloat, 1, "found_inf");
  step.clip = on_device<const double>(own.clip, device, kDouble, 1, "clip");
  STD_TORCH_CHECK(device_counts == (step.device_samplings != nullptr) &&
                      device_counts == (step.device_samplings_float != nullptr) &&
                      device_counts == (step.agings != nullptr || segments.empty()),
                  "step_: `samplings64`, `samplings32`, `marks` and `agings` go together");
  const auto* settings = on_device<const Setting>(own.settings, device, kDouble,
                                                  group_count * kSettingColumns, "settings");
  auto* schedules = on_device<Schedule>(own.schedules, device, kDouble,
                                        group_count * kScheduleColumns, "schedules");
  STD_TORCH_CHECK(
      (settings != nullptr) == (schedules != nullptr) && (device_counts || settings == nullptr),
      "step_: `settings` and `schedules` go together, where the device counts");
  step.schedules = schedules;
  step.stream = stream;
  const char* error = nullptr;
  if (schedules != nullptr) error = prepare_cuda(settings, schedules, group_count, stream);
  if (error == nullptr) error = step_in_launches(segments, step);
  STD_TORCH_CHECK(error == nullptr, "step_: ", error);
  if (!device_counts) grow(segments, tables);
}

void sum_squares_on(const std::vector<View>& grads, const View& sums, DLDevice device,
                    void* stream) {
  const std::vector<Summed> checked = summed(grads, sums, device);
  const char* error = sum_squares_in_launches(checked, static_cast<double*>(sums.data), stream);
  STD_TORCH_CHECK(error == nullptr, "sum_squares_: ", error);
}

void advance_on(const CountTables& tables, DLDevice device, void* stream) {
  const int64_t samplers = numel_of(tables.counts) - 1;
  const int64_t samplings = 2 * samplers * kSamplingColumns;
  DeviceCounters d{};
  d.samplers = samplers;
  d.segments = numel_of(tables.marks) / 2;
  d.counts = on_device<int64_t>(tables.counts, device, kInt64, 1, "counts");
  d.policies = on_device<const Policy>(tables.policies, device, kDouble, samplers * kPolicyColumns,
                                       "policies");
  d.samplings = on_device<double>(tables.samplings, device, kDouble, samplings, "samplings64");
  d.samplings_float =
      on_device<float>(tables.samplings_float, device, kFloat, samplings, "samplings32");
  d.marks = on_device<int32_t>(tables.marks, device, kInt32, 0, "marks");
  d.found_inf = on_device<const float>(tables.found_inf, device, kFloat, 1, "found_inf");
  d.schedules = on_device<Schedule>(tables.schedules, device, kDouble, 0, "schedules");
  d.groups = d.schedules != nullptr ? numel_of(tables.schedules) / kScheduleColumns : 0;
  const char* error = advance_cuda(d, stream);
  STD_TORCH_CHECK(error == nullptr, "advance_: ", error);
}
