// The CPU loop for segments with several averages: lines (1)-(5), and then line (6) for each
// average beside the first while the weights are in the first-level cache. cpu/loop.h includes this
// file once per instruction set; it has no include guard and includes nothing.

// Elements that are stepped and then sampled.
constexpr int64_t kInCache = 1024;

// What each average samples: that of a segment without a gradient. Before the step those begin that
// begin with the weights then.
template <typename T, typename Sample>
void each_further(const Segment& s, bool before, const Sample& sample) {
  for (const Further* f = s.further; f != s.further + s.further_count; ++f) {
    if (before ? !f->current : f->w == 0) continue;
    Coefficients<T> k{};
    k.w = before ? T(1) : T(f->w);
    sample(*f, k);
  }
}

template <typename T>
void further_full(const Segment& s, bool before, int64_t begin, int64_t n) {
  each_further<T>(s, before, [&](const Further& f, const Coefficients<T>& k) {
    Places<T> at{};
    at.theta = static_cast<T*>(s.theta) + begin;
    at.a = static_cast<T*>(f.a) + begin;
    shared_loop<Kind::kSample, true, T>(k, at, n);
  });
}

// The same for averages of 16-bit parameters, which sample weights in float.
template <typename S>
void further_narrow(const Segment& s, bool before, float* theta, int64_t begin, int64_t n) {
  each_further<float>(s, before, [&](const Further& f, const Coefficients<float>& k) {
    Stream<S> a(f.a, s.a_dtype, begin);
    Places<float> at{};
    at.theta = theta;
    at.a = a.load(0, n);
    shared_loop<Kind::kSample, true, float>(k, at, n);
    a.store(0, n);
  });
}

template <typename T>
void range_full_of_all(const Segment& s, const Row& row, const Aging<double>& aging,
                       const Sampling& sampling, int64_t begin, int64_t n) {
  for (int64_t at = begin; at < begin + n; at += kInCache) {
    const int64_t size = begin + n - at < kInCache ? begin + n - at : kInCache;
    further_full<T>(s, true, at, size);
    range(s, row, aging, sampling, at, size);
    further_full<T>(s, false, at, size);
  }
}

// A tile of 16-bit weights without masters is given some, which hold the weights as they are before
// they are rounded.
template <typename S>
void range_narrow_of_all(const Segment& s, const Row& row, const Aging<double>& aging,
                         const Sampling& sampling, int64_t begin, int64_t n) {
  alignas(kLine) float scratch[kTile];
  Segment own = s;
  own.param = s.param != nullptr ? s.param : s.theta;
  own.theta_dtype = Dtype::kFloat32;
  for (int64_t at = begin; at < begin + n; at += kTile) {
    const int64_t size = begin + n - at < kTile ? begin + n - at : kTile;
    float* theta = scratch;
    const S* param = static_cast<const S*>(own.param) + at;
    if (s.param != nullptr) {
      theta = static_cast<float*>(s.theta) + at;
      follow(theta, param, size);
    } else {
      widen(param, theta, size);
      // A segment's addresses are those of its first element.
      own.theta = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(scratch) -
                                          static_cast<uintptr_t>(at) * sizeof(float));
    }
    further_narrow<S>(s, true, theta, at, size);
    range(own, row, aging, sampling, at, size);
    further_narrow<S>(s, false, theta, at, size);
  }
}

// As `range`.
void range_of_all(Segment s, const Row& row, const Aging<double>& aging, Sampling sampling,
                  int64_t begin, int64_t n) {
  if (s.kind == Kind::kSample && s.a == nullptr) {  // the next one is as good as a first
    s.a = s.further->a;
    sampling = {1, s.further->w, 1, static_cast<double>(s.further->current), 0};
    ++s.further, --s.further_count;
  }
  with_storage(s.dtype, [&]<typename S>() {
    if constexpr (kNarrow<S>) return range_narrow_of_all<S>(s, row, aging, sampling, begin, n);
    if constexpr (!kNarrow<S>) range_full_of_all<S>(s, row, aging, sampling, begin, n);
  });
}
