// The CPU loop for 16-bit storage: tiles around `loop` of cpu/loop.h, which includes this file once
// per instruction set; it has no include guard and includes nothing.

// 16-bit storage is widened to float in tiles that stay in the first-level cache.
constexpr int64_t kTile = 256;
// A vector that crosses two lines of the cache is two accesses, so tiles begin at a line. Where
// they lay by chance, float16 took 5 to 15 % longer (4,096 elements, 1 core of an AMD EPYC,
// 2026-11).
constexpr size_t kLine = 64;

template <typename S>
inline void widen(const S* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = ::widen(from[i]);
}

template <typename S>
inline void narrow(const float* from, S* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) ::narrow(from[i], to[i]);
}

// g++ does not vectorise the conversion of float16 by itself. As wide as the loop's loads: a vector
// that was stored as two halves has to reach the cache before it can be loaded whole.
#if defined(RBWA_AVX512)
constexpr int64_t kHalves = 16;

inline void widen_vector(const Float16* from, float* to) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm512_storeu_ps(to, _mm512_cvtph_ps(halves));
}

inline void narrow_vector(const float* from, Float16* to) {
  const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
#elif defined(RBWA_F16C)
constexpr int64_t kHalves = 8;

inline void widen_vector(const Float16* from, float* to) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtph_ps(halves));
}

inline void narrow_vector(const float* from, Float16* to) {
  const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
#endif

#if defined(RBWA_F16C)
inline void widen(const Float16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kHalves <= n; i += kHalves) widen_vector(from + i, to + i);
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].bits);
}

inline void narrow(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
  for (; i + kHalves <= n; i += kHalves) narrow_vector(from + i, to + i);
  for (; i < n; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}
#endif

// One stream of a segment whose parameter has 16 bits: widened for a tile and narrowed back, or
// float32 already, which needs neither.
template <typename S>
struct Stream {
  alignas(kLine) float tile[kTile];
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
  alignas(kLine) S rounded[kTile];
  alignas(kLine) float of_master[kTile], of_param[kTile];
  narrow(master, rounded, n);
  widen(rounded, of_master, n);
  widen(param, of_param, n);
  for (int64_t i = 0; i < n; ++i) master[i] = followed(master[i], of_master[i], of_param[i]);
}

template <Kind kind, bool averaged, typename S>
void range_narrow(const Segment& s, const Coefficients<float>& k, int64_t begin, int64_t n) {
  Stream<S> theta(s.theta, s.theta_dtype, begin), g(const_cast<void*>(s.g), s.dtype, begin),
      a(s.a, s.a_dtype, begin);
#define RBWA_STREAM(stream, when) Stream<S> stream(s.stream, s.kept_dtype, begin);
  RBWA_KEPT(RBWA_STREAM)
#undef RBWA_STREAM
  S* param = s.param != nullptr ? static_cast<S*>(s.param) + begin : nullptr;
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t size = n - at < kTile ? n - at : kTile;
    Places<float> places;
    places.theta = theta.load(at, size);
    if constexpr (kind != Kind::kSample) places.g = g.load(at, size);
    if constexpr (averaged) places.a = a.load(at, size);
#define RBWA_LOAD(stream, when) \
  if constexpr (keeps_##stream(kind)) places.stream = stream.load(at, size);
    RBWA_KEPT(RBWA_LOAD)
#undef RBWA_LOAD
    if (param != nullptr) follow(places.theta, param + at, size);
    run<kind, averaged, float>(k, places, size);
    if constexpr (averaged) a.store(at, size);
#define RBWA_STORE(stream, when) \
  if constexpr (keeps_##stream(kind)) stream.store(at, size);
    RBWA_KEPT(RBWA_STORE)
#undef RBWA_STORE
    if (!writes_weight<kind>(k)) continue;
    theta.store(at, size);
    if (param != nullptr) narrow(places.theta, param + at, size);
  }
}
