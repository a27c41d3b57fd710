// The gradients that Python hands over for their norm, checked.
#pragma once

#include <vector>

#include "norm.h"
#include "views.h"

// Gradients on one device and memory for the sums (float64, one and one for each chunk), or an
// error; nothing has been written then.
std::vector<Summed> summed(const std::vector<View>& grads, const View& sums, DLDevice device);
