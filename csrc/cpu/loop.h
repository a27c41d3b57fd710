// The CPU loop around update.h. cpu/step_cpu.cpp includes this file once per instruction set,
// inside a namespace and a target of its own; it has no include guard.

// Where the streams of some elements stand, in the arithmetic's dtype.
template <typename T>
struct Places {
  T* theta;
  const T* g;
  T* a;
#define RBWA_FIELD(stream, when) T* stream;
  RBWA_KEPT(RBWA_FIELD)
#undef RBWA_FIELD
};

// The whole of the work for float and double.
template <Kind kind, bool averaged, typename T>
inline void loop(const Coefficients<T>& coefficients, const Places<T> at, int64_t n) {
  const Coefficients<T> k = coefficients;  // a copy cannot alias the streams
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    Element<T> e;
    e.theta = at.theta[i];
    if constexpr (kind != Kind::kSample) e.g = at.g[i];
    if constexpr (averaged) e.a = at.a[i];
#define RBWA_LOAD(stream, when) \
  if constexpr (keeps_##stream(kind)) e.stream = at.stream[i];
    RBWA_KEPT(RBWA_LOAD)
#undef RBWA_LOAD
    update<kind, averaged>(k, e);
#define RBWA_STORE(stream, when) \
  if constexpr (keeps_##stream(kind)) at.stream[i] = e.stream;
    RBWA_KEPT(RBWA_STORE)
#undef RBWA_STORE
    if constexpr (averaged) at.a[i] = e.a;
    if (writes_weight<kind>(k)) at.theta[i] = e.theta;
  }
}

// The loop of kinds that compute much, compiled once for the three storages of float: a call for
// each tile is little beside roots and divisions, and these loops are half of the build.
template <Kind kind, bool averaged, typename T>
__attribute__((noinline)) void shared_loop(const Coefficients<T>& k, const Places<T>& at,
                                           int64_t n) {
  loop<kind, averaged, T>(k, at, n);
}

template <Kind kind, bool averaged, typename T>
RBWA_HOST void run(const Coefficients<T>& k, const Places<T>& at, int64_t n) {
  if constexpr (is_adam(kind)) return shared_loop<kind, averaged, T>(k, at, n);
  loop<kind, averaged, T>(k, at, n);
}

template <Kind kind, bool averaged, typename T>
void range_full(const Segment& s, const Coefficients<T>& k, int64_t begin, int64_t n) {
  auto from = [&](auto* stream) { return stream ? static_cast<T*>(stream) + begin : nullptr; };
  Places<T> at;
  at.theta = from(s.theta);
  at.g = s.g ? static_cast<const T*>(s.g) + begin : nullptr;
  at.a = from(s.a);
#define RBWA_PLACE(stream, when) at.stream = from(s.stream);
  RBWA_KEPT(RBWA_PLACE)
#undef RBWA_PLACE
  run<kind, averaged, T>(k, at, n);
}

#include "cpu/narrow_loop.h"

template <Kind kind, typename T>
RBWA_HOST Coefficients<T> arithmetic(const Row& row, const Aging<double>& aging,
                                     const Sampling& sampling) {
  Coefficients<T> k{rounded<Numbers<T>, T>(row.numbers), T(1), T(sampling.w), sampling.current != 0,
                    sampling.write_back != 0};
  if constexpr (is_adam(kind)) age(k, rounded<Aging<T>, T>(aging));
  k.eta *= T(sampling.scale);
  return k;
}

template <Kind kind, bool averaged>
void range_of_kind(const Segment& s, const Row& row, const Aging<double>& aging,
                   const Sampling& sampling, int64_t begin, int64_t n) {
  with_storage(s.dtype, [&]<typename S>() {
    using T = typename Arithmetic<S>::type;
    const Coefficients<T> k = arithmetic<kind, T>(row, aging, sampling);
    if constexpr (kNarrow<S>) {
      range_narrow<kind, averaged, S>(s, k, begin, n);
    } else {
      range_full<kind, averaged, S>(s, k, begin, n);
    }
  });
}

// Takes the step for elements [begin, begin + n) of a segment: which streams there are decides the
// loop, once per call.
void range(const Segment& s, const Row& row, const Aging<double>& aging, const Sampling& sampling,
           int64_t begin, int64_t n) {
  with_kind(s.kind, [&]<Kind kind>() {
    if (s.a != nullptr) return range_of_kind<kind, true>(s, row, aging, sampling, begin, n);
    if constexpr (kind != Kind::kSample) {
      range_of_kind<kind, false>(s, row, aging, sampling, begin, n);
    }
  });
}

#include "cpu/several.h"
