// The update: lines (1)-(5) of README.md for one element. Values in, values out; no pointer, no
// torch, no CUDA header. Every kernel is a loop around this function, and nothing else computes.
#pragma once

#if defined(__CUDACC__)
#define RBWA_INLINE __host__ __device__ __forceinline__
#else
#define RBWA_INLINE inline __attribute__((always_inline))
#endif

// What line (2) keeps between steps: the part of a rule that decides which streams are touched.
enum class Rule {
  kSample,      // nothing: the element has no gradient, and its average samples it where it is
  kPlain,       // nothing: SGD without momentum
  kMomentum,    // m: SGD with momentum, Nesterov, SGDM, implicit RSGDM
  kDifference,  // m, z and the previous gradient: explicit RSGDM
};

// One row of the coefficient table in the kernel's arithmetic: float, or double for float64.
template <typename T>
struct Coefficients {
  T s;           // +1, or -1 to maximize
  T lambda;      // weight decay
  T mu;          // decay of m (and of z)
  T c;           // what the gradient adds to m
  T kappa;       // what the gradient's difference adds to z
  T alpha;       // the gradient's share of the direction
  T gamma;       // m's share
  T delta;       // z's share
  T eta;         // learning rate
  T w;           // weight of this sample in the average
  bool current;  // the average starts at theta as it was before this step
  bool write_back;
};

// The float32 master of a 16-bit parameter, `rounded` as the last step left the parameter. A
// parameter that somebody has written to since is its own master from then on.
template <typename T>
RBWA_INLINE T followed(T master, T rounded, T param) {
  return rounded == param ? master : param;
}

// One element of every stream. A rule reads and writes the members it has.
template <typename T>
struct Element {
  T theta, g, m, z, previous, a;
};

// A zero coefficient drops its term instead of multiplying by it, so that an infinite gradient or
// weight spreads exactly as far as in torch.optim.SGD (0 * inf is NaN). Coefficients are uniform:
// each choice is a select outside the memory streams, not a branch per element.
template <Rule rule, bool averaged, typename T>
RBWA_INLINE void update(const Coefficients<T>& k, Element<T>& e) {
  T x = e.theta;
  [[maybe_unused]] const T a = k.current ? e.theta : e.a;
  if constexpr (rule != Rule::kSample) {
    T g = k.s * e.g;
    g = k.lambda != T(0) ? g + k.lambda * e.theta : g;  // (1)
    T direction = g;
    if constexpr (rule == Rule::kMomentum || rule == Rule::kDifference) {
      e.m = k.mu * e.m + k.c * g;  // (2)
      const T m = k.gamma * e.m;
      direction = k.alpha != T(0) ? k.alpha * g + m : m;
    }
    if constexpr (rule == Rule::kDifference) {
      e.z = k.mu * e.z + k.kappa * (g - e.previous);  // (2) for the gradient's difference
      e.previous = g;
      direction = direction + k.delta * e.z;
    }
    x = e.theta - k.eta * direction;  // (3)
  }
  if constexpr (averaged) {
    e.a = k.w == T(1) ? x : k.w != T(0) ? a + k.w * (x - a) : a;  // (4)
    x = k.write_back ? e.a : x;                                   // (5)
  }
  e.theta = x;
}

// Not where a step only samples the weight, which another process may write at that time.
template <Rule rule, typename T>
RBWA_INLINE bool writes_weight(const Coefficients<T>& k) {
  return rule != Rule::kSample || k.write_back;
}

// Elastic replicas: one weight of K models. The mean is the first model's weight and the mean
// distance of the others from it, so that equal weights are exactly their own mean; distances are
// summed in the models' order, and `share` is 1/K.
template <typename T>
RBWA_INLINE T farther(T distance, T theta, T first) {
  return distance + (theta - first);
}

template <typename T>
RBWA_INLINE T mean_of(T first, T distance, T share) {
  return first + share * distance;
}

// A model's weight, pulled to the mean. alpha = 1 makes the models equal to the last bit, which
// theta + (mean - theta) would not.
template <typename T>
RBWA_INLINE T pulled(T theta, T mean, T alpha) {
  return alpha == T(1) ? mean : alpha != T(0) ? theta + alpha * (mean - theta) : theta;
}
