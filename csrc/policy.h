// The named averaging policies as numbers, and what becomes of the sample of one step: the mirror
// of `Sampler.update` (engine/samplers.py) and of each weight's `of` (average.py), for counters
// that live on a device. No torch, no CUDA header.
#pragma once

#include <cstdint>

#include "schedule.h"
#include "step.h"
#include "update.h"

enum class Weight : int32_t {  // `on_device` in weights.py and ramp.py
  kNone,
  kMean,
  kEma,
  kAlgorithm2,
  kHalfLife,
  kCountRamp,
  kInverseRamp,
  kExponentialRamp,
  kPowerEma,
  kCosine,
  kTable,
};

// One row of the policy table as engine/counters.py packs it; behind the rows stand the weights
// that policies have in tables.
struct Policy {
  double weight;
  double origin;  // samples are taken `every` steps after it, and so on
  double every, write_back_every;
  double begins;      // the weights behind this step are the first sample; or infinity
  double stop;        // no later step is sampled; or infinity
  double numbers[4];  // of the weight, in the order of its `numbers` in weights.py
};
constexpr int64_t kPolicyColumns = sizeof(Policy) / sizeof(double);

RBWA_INLINE double smaller(double a, double b) { return b < a ? b : a; }
RBWA_INLINE double larger(double a, double b) { return a < b ? b : a; }

// sin(pi x). CUDA's sin takes a stack, for arguments that never come here.
RBWA_INLINE double sin_pi(double x) {
#if defined(__CUDA_ARCH__)
  return ::sinpi(x);
#else
  return std::sin(3.14159265358979323846 * x);
#endif
}

// Weight of the sample taken after `step` when `n` samples are averaged already. `policies` is the
// whole table.
RBWA_INLINE double weight_of(const Policy& policy, int64_t n, int64_t step,
                             const Policy* policies) {
  if (n == 0) return 1.0;
  const double* numbers = policy.numbers;
  const double cap = numbers[0], most = numbers[1];  // of a ramp
  const double count = static_cast<double>(n);
  switch (static_cast<Weight>(static_cast<int32_t>(policy.weight))) {
    case Weight::kMean:
      return 1.0 / (count + 1);
    case Weight::kEma:
      return 1.0 - numbers[0];
    case Weight::kHalfLife:
      return numbers[0];
    case Weight::kCountRamp:
      return smaller(larger(9.0 / (10.0 + count), cap), most);
    case Weight::kInverseRamp:
      return smaller(larger(std::pow(1.0 + count / numbers[2], -numbers[3]), cap), most);
    case Weight::kExponentialRamp:
      return smaller(larger(cap + (1.0 - cap) * std::exp(-count / numbers[2]), cap), most);
    case Weight::kPowerEma: {
      const double at = static_cast<double>(step);
      if (at - policy.every <= policy.origin) return 1.0;
      return -std::expm1((numbers[0] + 1.0) * std::log1p(-(policy.every / (at - numbers[1]))));
    }
    case Weight::kCosine: {
      const double j = smaller(count + 1, numbers[0]), twice = 2 * numbers[0];
      const double whole = sin_pi(j / twice);
      return sin_pi((2 * j - 1) / twice) * sin_pi(1 / twice) / (whole * whole);
    }
    case Weight::kTable: {
      const double begun = policy.begins < HUGE_VAL ? 1 : 0;
      const double at = numbers[1] + smaller(count - begun, numbers[0] - 1);
      return reinterpret_cast<const double*>(policies)[static_cast<int64_t>(at)];
    }
    default: {
      const int64_t steps_per_epoch = static_cast<int64_t>(numbers[0]);
      const int64_t start_epoch = static_cast<int64_t>(numbers[1]);
      const int64_t epoch = (step - 1) / steps_per_epoch + 1;
      const int64_t batch = (step - 1) % steps_per_epoch;
      return 1.0 / static_cast<double>((epoch - start_epoch) * batch + 1);
    }
  }
}

// What the step numbered `step` (from 1) does to an average in a buffer, and to the learning rate
// where the average is the parameter itself (`itself`). Returns the samples averaged after it.
RBWA_INLINE int64_t sampling_of(const Policy& policy, int64_t n, int64_t step,
                                const Policy* policies, Sampling& buffered, Sampling& itself) {
  buffered = {1, 0, 0, 0, 0};
  itself = {1, 0, 0, 0, 0};
  if (policy.weight == 0) return n;
  if (n == 0 && static_cast<double>(step) > policy.begins) {
    buffered.current = buffered.sample = 1;
    n = 1;
  }
  const int64_t past = step - static_cast<int64_t>(policy.origin);
  if (past <= 0 || past % static_cast<int64_t>(policy.every) != 0) return n;
  if (static_cast<double>(step) > policy.stop) return n;
  const int64_t write_back_every = static_cast<int64_t>(policy.write_back_every);
  buffered.sample = 1;
  buffered.w = itself.scale = weight_of(policy, n, step, policies);
  buffered.write_back = write_back_every > 0 && past % write_back_every == 0;
  return n + 1;
}

// Under AMP and in captured graphs only the device knows whether a step happened, so it counts.
// Kernels read `samplings` of the step to come; `advance` counts the step just taken.
// engine/counters.py has the same name for the tensors.
struct DeviceCounters {
  int64_t* counts;         // steps, then the samples of each sampler
  const Policy* policies;  // and their tables
  int64_t samplers;
  double* samplings;       // rows of struct Sampling, two a sampler
  float* samplings_float;  // the same, rounded
  int32_t* marks;          // for each segment: its age (tables.h), and by how much this step adds
  int64_t segments;
  Schedule* schedules;  // of each param group, where its rule counts steps; or null
  int64_t groups;
  const float* found_inf;  // not zero: the step was skipped; null: never
};

// Thread `thread` of `threads` that count a step together. `counts[0]` is written by the last
// statement of thread 0 alone, so the caller must let all others read it first: `step` is given.
RBWA_INLINE void advance(const DeviceCounters& d, int64_t step, int64_t thread, int64_t threads) {
  for (int64_t i = thread; i < d.segments; i += threads) {
    d.marks[2 * i] += d.marks[2 * i + 1];
    d.marks[2 * i + 1] = 0;
  }
  for (int64_t i = thread; i < d.groups; i += threads) d.schedules[i].now = d.schedules[i].left;
  for (int64_t i = thread; i < d.samplers; i += threads) {
    Sampling rows[2];
    const Policy policy = d.policies[i];
    const int64_t n = sampling_of(policy, d.counts[1 + i], step, d.policies, rows[0], rows[1]);
    d.counts[1 + i] = n;
    sampling_of(policy, n, step + 1, d.policies, rows[0], rows[1]);
    for (int row = 0; row < 2; ++row) {
      const double numbers[] = {rows[row].scale, rows[row].w, rows[row].sample, rows[row].current,
                                rows[row].write_back};
      for (int k = 0; k < 5; ++k) {
        const int64_t at = (2 * i + row) * kSamplingColumns + k;
        d.samplings[at] = numbers[k];
        d.samplings_float[at] = static_cast<float>(numbers[k]);
      }
    }
  }
}
