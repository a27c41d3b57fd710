// The replicas that Python hands to the operator, checked.
#pragma once

#include <vector>

#include "replicas.h"
#include "tables.h"

// Parameters of K models, all of the first model's before the second's, as addresses on one device;
// or an error that names what does not fit.
std::vector<Replicated> replicated(const std::vector<View>& params, int64_t replicas, double alpha,
                                   DLDevice device);
