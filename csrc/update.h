// The update: lines (1)-(5) of README.md for one element. Values in, values out; no pointer, no
// torch, no CUDA header. Every kernel is a loop around this function, and nothing else computes.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define RBWA_INLINE __host__ __device__ __forceinline__
#else
#define RBWA_INLINE inline __attribute__((always_inline))
#endif

// clang-format off: a line each

// The kinds: the part of a rule that decides which streams are touched. Every dispatch goes by this
// list; rbwa_fused/rules.py has the same one in the same order.
#define RBWA_KINDS(kind)                                                               \
  kind(kSample)       /* no gradient: the element's average samples it where it is */  \
  kind(kPlain)        /* SGD without momentum */                                       \
  kind(kMomentum)     /* SGD with momentum, Nesterov, SGDM, implicit RSGDM */          \
  kind(kDecoupled)    /* the same with decoupled decay: SGDW, schedule-free SGD */     \
  kind(kDifference)   /* explicit RSGDM */                                             \
  kind(kAdam)         /* Adam, AdamW */                                                \
  kind(kAmsgrad)      /* the same, divided by the largest v so far */                  \
  kind(kScheduleFree) /* schedule-free AdamW: the gradient is divided before line (1) */

// The streams that line (2) keeps of each element between steps: its name, and the kinds that have
// it. All loops, checks and tables go by this list; rbwa_fused/streams.py has the same one in the
// same order.
#define RBWA_KEPT(stream)                       \
  stream(m, kind >= Kind::kMomentum)            \
  stream(z, kind == Kind::kDifference)          \
  stream(previous, kind == Kind::kDifference)   \
  stream(v, is_adam(kind))                      \
  stream(v_max, kind == Kind::kAmsgrad)

// clang-format on

#define RBWA_NAME(name) name,
enum class Kind : int32_t { RBWA_KINDS(RBWA_NAME) };
#undef RBWA_NAME

// The kinds whose step depends on a parameter's age, by Aging.
RBWA_INLINE constexpr bool is_adam(Kind kind) { return kind >= Kind::kAdam; }

// The kinds with decoupled decay.
RBWA_INLINE constexpr bool decouples(Kind kind) {
  return kind == Kind::kDecoupled || is_adam(kind);
}

// The kinds whose direction may have a share of the gradient beside m's.
RBWA_INLINE constexpr bool mixes(Kind kind) {
  return kind == Kind::kMomentum || kind == Kind::kDecoupled || kind == Kind::kScheduleFree;
}

#define RBWA_KEEPS(name, when) \
  RBWA_INLINE constexpr bool keeps_##name(Kind kind) { return when; }
RBWA_KEPT(RBWA_KEEPS)
#undef RBWA_KEEPS

// Whether a step of this kind makes a parameter older: it has streams that begin with its first
// one.
#define RBWA_OR(name, when) || keeps_##name(kind)
RBWA_INLINE constexpr bool keeps_any(Kind kind) { return false RBWA_KEPT(RBWA_OR); }
#undef RBWA_OR

// A rule's numbers, which Row (step.h) holds in this order: rules.py's Coefficients, behind its
// kind. T is the kernel's arithmetic: float, or double for float64.
template <typename T>
struct Numbers {
  T s;        // +1, or -1 to maximize
  T lambda;   // weight decay, coupled
  T mu;       // decay of m (and of z)
  T c;        // what the gradient adds to m
  T kappa;    // what the gradient's difference adds to z
  T alpha;    // the gradient's share of the direction
  T gamma;    // m's share
  T delta;    // z's share
  T nu;       // decay of v
  T q;        // what the gradient's square adds to v
  T epsilon;  // added to the root of v
  T rho;      // weight decay, decoupled
  T eta;      // learning rate
};

// What a parameter's age makes of its row at its t-th step, t = age + 1. Adam's averages both start
// at zero: m is too small by 1 - mu^t, v by 1 - nu^t. Of schedule-free AdamW only v does.
template <typename T>
struct Aging {
  T bias;  // of the root of v: 1 / sqrt(1 - nu^t)
  T eta;   // the learning rate, divided by 1 - mu^t
  T rho;   // the decay, multiplied by it: eta rho stays what it is
};

RBWA_INLINE double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base) {
    if (exponent & 1) result *= base;
  }
  return result;
}

RBWA_INLINE Aging<double> aging_of(Kind kind, const Aging<double>& row, double mu, double nu,
                                   int64_t age) {
  if (!is_adam(kind)) return row;
  const double grown = kind == Kind::kScheduleFree ? 1 : 1 - power(mu, age + 1);
  return {1 / std::sqrt(1 - power(nu, age + 1)), row.eta / grown, row.rho * grown};
}

RBWA_INLINE Aging<double> aging_of(Kind kind, const Numbers<double>& row, int64_t age) {
  return aging_of(kind, {1, row.eta, row.rho}, row.mu, row.nu, age);
}

// One element's coefficients: its rule's, and what becomes of its sample.
template <typename T>
struct Coefficients : Numbers<T> {
  T bias;        // Aging's, as eta and rho are
  T w;           // weight of this sample in the average
  bool current;  // the average starts at theta as it was before this step
  bool write_back;
  bool begins;  // so does m, see `begin`
};

template <typename T>
RBWA_INLINE void age(Coefficients<T>& k, const Aging<T>& aging) {
  k.bias = aging.bias;
  k.eta = aging.eta;
  k.rho = aging.rho;
}

// The float32 master of a 16-bit parameter, `rounded` as the last step left the parameter. A
// parameter that somebody has written to since is its own master from then on.
template <typename T>
RBWA_INLINE T followed(T master, T rounded, T param) {
  return rounded == param ? master : param;
}

// One element of every stream. A kind reads and writes the members it has.
template <typename T>
struct Element {
  T theta, g, a;
#define RBWA_FIELD(name, when) T name;
  RBWA_KEPT(RBWA_FIELD)
#undef RBWA_FIELD
};

// Where a device counts, it begins m of schedule-free learning; elsewhere the host has.
template <Kind kind, typename T>
RBWA_INLINE void begin(const Coefficients<T>& k, Element<T>& e) {
  if constexpr (keeps_m(kind)) e.m = k.begins ? e.theta : e.m;
}

// Line (2) for v, and what it divides by.
template <Kind kind, typename T>
RBWA_INLINE T divisor(const Coefficients<T>& k, Element<T>& e, T g) {
  // Not (1 - nu) g^2, which overflows where torch.optim.Adam does not.
  e.v = k.nu * e.v + (k.q * g) * g;
  T v = e.v;
  if constexpr (keeps_v_max(kind)) {
    e.v_max = v <= e.v_max ? e.v_max : v;  // NaN stays
    v = e.v_max;
  }
  return std::sqrt(v) * k.bias + k.epsilon;
}

// A zero coefficient drops its term instead of multiplying by it, so that an infinite gradient or
// weight spreads exactly as far as in torch.optim.SGD (0 * inf is NaN). Coefficients are uniform:
// each choice is a select outside the memory streams, not a branch per element.
template <Kind kind, bool averaged, typename T>
RBWA_INLINE void update(const Coefficients<T>& k, Element<T>& e) {
  T x = e.theta;
  [[maybe_unused]] const T a = k.current ? e.theta : e.a;
  if constexpr (kind != Kind::kSample) {
    T g = k.s * e.g;
    if constexpr (kind == Kind::kScheduleFree) g = g / divisor<kind>(k, e, g);
    g = k.lambda != T(0) ? g + k.lambda * e.theta : g;  // (1)
    T direction = g;
    if constexpr (keeps_m(kind)) {
      e.m = k.mu * e.m + k.c * g;  // (2)
      const T m = k.gamma * e.m;
      direction = m;
      if constexpr (mixes(kind)) direction = k.alpha != T(0) ? k.alpha * g + m : m;
    }
    if constexpr (keeps_z(kind)) {
      e.z = k.mu * e.z + k.kappa * (g - e.previous);  // (2) for the gradient's difference
      e.previous = g;
      direction = direction + k.delta * e.z;
    }
    if constexpr (keeps_v(kind) && kind != Kind::kScheduleFree) {
      direction = direction / divisor<kind>(k, e, g);
    }
    if constexpr (decouples(kind)) {
      direction = k.rho != T(0) ? direction + k.rho * e.theta : direction;
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
template <Kind kind, typename T>
RBWA_INLINE bool writes_weight(const Coefficients<T>& k) {
  return kind != Kind::kSample || k.write_back;
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
