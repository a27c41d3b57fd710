// The CPU loop around update.h. cpu/step_cpu.cpp includes this file once per instruction set,
// inside a namespace and a target of its own; it has no include guard and includes nothing.

// 16-bit storage is widened to float in tiles that stay in the first-level cache.
constexpr int64_t kTile = 256;

inline float widen(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline Bfloat16 narrow(Bfloat16*, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <typename S>
inline void widen(const S* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <typename S>
inline void narrow(const float* from, S* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow(to, from[i]);
}

#if defined(RBWA_F16C)  // g++ does not vectorise the conversion of _Float16 by itself
inline void widen(const Float16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) to[i] = widen_float16(from[i]);
}

inline void narrow(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  for (; i < n; ++i) to[i] = narrow_float16(from[i]);
}
#else
inline void widen(const Float16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen_float16(from[i]);
}

inline void narrow(const float* from, Float16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = narrow_float16(from[i]);
}
#endif

// The whole of the work for float and double.
template <Rule rule, bool averaged, typename T>
void loop(const Coefficients<T>& coefficients, T* theta, const T* g, T* m, T* z, T* previous, T* a,
          int64_t n) {
  const Coefficients<T> k = coefficients;  // a copy cannot alias the streams
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    Element<T> e;
    e.theta = theta[i];
    if constexpr (rule != Rule::kSample) e.g = g[i];
    if constexpr (rule == Rule::kMomentum || rule == Rule::kDifference) e.m = m[i];
    if constexpr (rule == Rule::kDifference) e.z = z[i], e.previous = previous[i];
    if constexpr (averaged) e.a = a[i];
    update<rule, averaged>(k, e);
    if constexpr (rule == Rule::kMomentum || rule == Rule::kDifference) m[i] = e.m;
    if constexpr (rule == Rule::kDifference) z[i] = e.z, previous[i] = e.previous;
    if constexpr (averaged) a[i] = e.a;
    if (writes_weight<rule>(k)) theta[i] = e.theta;
  }
}

template <Rule rule, bool averaged, typename T>
void range_full(const Segment& s, const Coefficients<T>& k, int64_t begin, int64_t n) {
  auto at = [&](auto* stream) { return stream ? static_cast<T*>(stream) + begin : nullptr; };
  const T* g = s.g ? static_cast<const T*>(s.g) + begin : nullptr;
  loop<rule, averaged, T>(k, at(s.theta), g, at(s.m), at(s.z), at(s.previous), at(s.a), n);
}

// One stream of a segment whose parameter has 16 bits: widened for a tile and narrowed back, or
// float32 already, which needs neither.
template <typename S>
struct Stream {
  float tile[kTile];
  S* data = nullptr;
  float* wide = nullptr;

  Stream(void* start, Dtype dtype, int64_t begin) {
    if (start == nullptr) return;
    if (dtype == Dtype::kFloat32) {
      wide = static_cast<float*>(start) + begin;
    } else {
      data = static_cast<S*>(start) + begin;
    }
  }
  float* load(int64_t at, int64_t n) {
    if (wide != nullptr) return wide + at;
    widen(data + at, tile, n);
    return tile;
  }
  void store(int64_t at, int64_t n) {
    if (wide == nullptr) narrow(tile, data + at, n);
  }
};

// The masters of a tile follow the parameters.
template <typename S>
void follow(float* master, const S* param, int64_t n) {
  S rounded[kTile];
  float of_master[kTile], of_param[kTile];
  narrow(master, rounded, n);
  widen(rounded, of_master, n);
  widen(param, of_param, n);
  for (int64_t i = 0; i < n; ++i) master[i] = followed(master[i], of_master[i], of_param[i]);
}

template <Rule rule, bool averaged, typename S>
void range_16bit(const Segment& s, const Coefficients<float>& k, int64_t begin, int64_t n) {
  constexpr bool momentum = rule == Rule::kMomentum || rule == Rule::kDifference;
  Stream<S> theta(s.theta, s.theta_dtype, begin), g(const_cast<void*>(s.g), s.dtype, begin),
      m(s.m, s.theta_dtype, begin), z(s.z, s.theta_dtype, begin),
      previous(s.previous, s.theta_dtype, begin), a(s.a, s.a_dtype, begin);
  S* param = s.param != nullptr ? static_cast<S*>(s.param) + begin : nullptr;
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t size = n - at < kTile ? n - at : kTile;
    float* theta_at = theta.load(at, size);
    float *g_at = nullptr, *m_at = nullptr, *z_at = nullptr, *previous_at = nullptr,
          *a_at = nullptr;
    if constexpr (rule != Rule::kSample) g_at = g.load(at, size);
    if constexpr (momentum) m_at = m.load(at, size);
    if constexpr (rule == Rule::kDifference) z_at = z.load(at, size);
    if constexpr (rule == Rule::kDifference) previous_at = previous.load(at, size);
    if constexpr (averaged) a_at = a.load(at, size);
    if (param != nullptr) follow(theta_at, param + at, size);
    loop<rule, averaged, float>(k, theta_at, g_at, m_at, z_at, previous_at, a_at, size);
    if constexpr (averaged) a.store(at, size);
    if constexpr (rule == Rule::kDifference) z.store(at, size), previous.store(at, size);
    if constexpr (momentum) m.store(at, size);
    if (!writes_weight<rule>(k)) continue;
    theta.store(at, size);
    if (param != nullptr) narrow(theta_at, param + at, size);
  }
}

template <typename T>
Coefficients<T> arithmetic(const Row& r, const Sampling& a) {
  return {T(r.s),     T(r.lambda),    T(r.mu),
          T(r.c),     T(r.kappa),     T(r.alpha),
          T(r.gamma), T(r.delta),     T(r.eta) * T(a.scale),
          T(a.w),     a.current != 0, a.write_back != 0};
}

template <Rule rule, bool averaged>
void range_of_rule(const Segment& s, const Row& row, const Sampling& sampling, int64_t begin,
                   int64_t n) {
  switch (s.dtype) {
    case Dtype::kFloat32:
      return range_full<rule, averaged, float>(s, arithmetic<float>(row, sampling), begin, n);
    case Dtype::kFloat64:
      return range_full<rule, averaged, double>(s, arithmetic<double>(row, sampling), begin, n);
    case Dtype::kBfloat16:
      return range_16bit<rule, averaged, Bfloat16>(s, arithmetic<float>(row, sampling), begin, n);
    case Dtype::kFloat16:
      return range_16bit<rule, averaged, Float16>(s, arithmetic<float>(row, sampling), begin, n);
  }
}

// Takes the step for elements [begin, begin + n) of a segment: which streams there are decides the
// loop, once per call.
void range(const Segment& s, const Row& row, const Sampling& sampling, int64_t begin, int64_t n) {
  if (s.a == nullptr) {
    if (s.g == nullptr) return;
    if (s.z != nullptr) return range_of_rule<Rule::kDifference, false>(s, row, sampling, begin, n);
    if (s.m != nullptr) return range_of_rule<Rule::kMomentum, false>(s, row, sampling, begin, n);
    return range_of_rule<Rule::kPlain, false>(s, row, sampling, begin, n);
  }
  if (s.g == nullptr) return range_of_rule<Rule::kSample, true>(s, row, sampling, begin, n);
  if (s.z != nullptr) return range_of_rule<Rule::kDifference, true>(s, row, sampling, begin, n);
  if (s.m != nullptr) return range_of_rule<Rule::kMomentum, true>(s, row, sampling, begin, n);
  return range_of_rule<Rule::kPlain, true>(s, row, sampling, begin, n);
}
