// The step and its count on a device, from the tables that Python hands over.
#pragma once

#include <vector>

#include "tables.h"

// What a device reads beside the tables of every step. Its counters are absent (dtype.bits is 0)
// where the host counts.
struct DeviceTables {
  std::vector<View> lrs;  // one a param group, in place of its row's eta, or absent
  View samplings;         // float64 (2 samplers, 5): struct Sampling of this step
  View samplings_float;   // the same, in float32
  View marks;             // int32 (segments, 2), see struct DeviceCounters
  View agings;            // float64 (segments, 3): room for struct Aging of each
  View grad_scale;        // float32, or absent
  View found_inf;         // float32, or absent
  View clip;              // float64 that multiplies the gradients, or absent
  View settings;          // float64 (groups, 6): struct Setting of this step, or absent
  View schedules;         // float64 (groups, 12): struct Schedule, with `settings`
};

// What `advance_on` counts; see struct DeviceCounters.
struct CountTables {
  View counts, policies, samplings, samplings_float, marks, found_inf, schedules;
};

// Takes the step on a device and stream; nothing has been changed where it throws.
void step_on(const std::vector<View>& params, const std::vector<View>& grads, const Tables& tables,
             const DeviceTables& own, DLDevice device, void* stream);

// The sum of squares on a device and stream, see norm.h.
void sum_squares_on(const std::vector<View>& grads, const View& sums, DLDevice device,
                    void* stream);

// Counts the step just taken, unless it was skipped, and prepares the next one's samplings.
void advance_on(const CountTables& tables, DLDevice device, void* stream);
