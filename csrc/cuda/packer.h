// Segments into launches: the same kind of memory streams together, as many segments as fit.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/kernel.h"
#include "step.h"

// What a step needs beside segments and the host's coefficient tables; addresses on the device.
struct CudaStep {
  const Row* rows;                 // two a group
  const Sampling* samplings;       // of the host
  std::vector<const float*> lrs;   // one a group, or null: the row has it
  const double* device_samplings;  // null: the host's count
  const float* device_samplings_float;
  int32_t* marks;  // with the device's samplings
  void* agings;    // Aging for each segment, in the arithmetic of the launch; with `marks`
  const Schedule* schedules;  // of each group, or null
  const float* grad_scale;
  const float* found_inf;
  const double* clip;
  void* stream;
};

// How steps are launched, for benchmarks to compare; the bits are the same.
struct LaunchForm {
  bool small = true;         // with arguments of 8 KB where they suffice, not always of 32
  bool block_table = false;  // each block's segment in the arguments where they fit, not bisection
};
extern LaunchForm launch_form;

// Takes the step for every segment. Returns null or CUDA's words for what went wrong.
const char* step_in_launches(const std::vector<Segment>& segments, const CudaStep& step);
