// Elastic replicas: K models pulled to their mean in one pass over memory. No torch, no CUDA
// header.
#pragma once

#include <cstdint>
#include <vector>

#include "step.h"

// One parameter of K models: dense tensors of one dtype and layout that do not overlap.
struct Replicated {
  std::vector<void*> theta;  // K addresses
  int64_t length;            // elements
  Dtype dtype;
};

struct Pull {
  double share;  // 1/K
  double alpha;
};

void pull_cpu(const std::vector<Replicated>& params, const Pull& pull);

// The loop of `pull_cpu` over elements [begin, begin + n), with the instruction set in use.
void pull_range_cpu(const Replicated& param, const Pull& pull, int64_t begin, int64_t n);
