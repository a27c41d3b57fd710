// How far a schedule-free group is, and the numbers of its step to come: the mirror of `progress`
// (progress.py) and `_scheduled` (rules.py), for what a device counts. No torch, no CUDA header.
#pragma once

#include <cmath>
#include <cstdint>

#include "update.h"

// What a group counts, in the order of `COUNTED` in progress.py. Whole numbers are exact.
struct Progress {
  double k;  // steps
  double weight_sum, lr_max, scheduled_lr;
};

// What the host says of a step, in the order of `settings` in rules.py behind the first.
struct Setting {
  double taken;  // 1 where a parameter of the group has a gradient, else 0
  double beta, warmup_steps, r, weight_lr_power;
  double lr;
};

// A group on the device: as it is, as the step to come leaves it, and that step's numbers of a row.
struct Schedule {
  Progress now, left;
  double c, alpha, gamma, rho;
};
constexpr int64_t kScheduleColumns = sizeof(Schedule) / sizeof(double);
constexpr int64_t kSettingColumns = sizeof(Setting) / sizeof(double);

// Small whole exponents, and halves, by multiplication and a root, which have the same bits
// everywhere; others by a function that is another one on each device.
RBWA_INLINE double to_the(double base, double exponent) {
  const double size = std::fabs(exponent), whole = std::floor(size);
  const bool half = size - whole == 0.5;
  if (!(size <= 16 && (half || size == whole))) return std::pow(base, exponent);
  double result = power(base, static_cast<int64_t>(whole));
  if (half) result *= std::sqrt(base);
  return exponent < 0 ? 1 / result : result;
}

// Makes the numbers of the step to come, and what it leaves. Asked again, it says the same.
RBWA_INLINE void prepare(const Setting& setting, Schedule& group) {
  const Progress now = group.now;
  double eta = setting.lr;
  if (now.k < setting.warmup_steps) eta *= (now.k + 1) / setting.warmup_steps;
  const double largest = now.lr_max > eta ? now.lr_max : eta;
  const double weight = to_the(now.k + 1, setting.r) * to_the(largest, setting.weight_lr_power);
  const double total = now.weight_sum + weight;
  const double c = total != 0 ? weight / total : 0;
  group.c = -eta;
  group.alpha = eta * (1 - c) * (1 - setting.beta);
  group.gamma = -c;
  group.rho = c;
  group.left = setting.taken != 0 ? Progress{now.k + 1, total, largest, eta} : now;
}
