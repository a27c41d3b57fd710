// The CPU loop around `pulled` of update.h. cpu/step_cpu.cpp includes this file behind cpu/loop.h,
// once per instruction set; it has no include guard and includes nothing.

inline const float* pull_load(const float* from, float*, int64_t) { return from; }
inline const double* pull_load(const double* from, double*, int64_t) { return from; }
template <typename S>
inline const float* pull_load(const S* from, float* tile, int64_t n) {
  widen(from, tile, n);
  return tile;
}

inline void pull_store(const float*, float*, int64_t) {}
inline void pull_store(const double*, double*, int64_t) {}
template <typename S>
inline void pull_store(const float* tile, S* to, int64_t n) {
  narrow(tile, to, n);
}

// Elements of every replica in turn, tile by tile: what the sum has read is still in the cache when
// it is pulled.
template <typename S, typename T>
void pull_tiles(const Replicated& param, T share, T alpha, int64_t begin, int64_t n) {
  const size_t replicas = param.theta.size();
  alignas(kLine) T first_tile[kTile], tile[kTile], distance[kTile], mean[kTile];
  for (int64_t at = begin; at < begin + n; at += kTile) {
    const int64_t size = begin + n - at < kTile ? begin + n - at : kTile;
    const T* first = pull_load(static_cast<const S*>(param.theta[0]) + at, first_tile, size);
    std::fill_n(distance, size, T(0));
    for (size_t k = 1; k < replicas; ++k) {
      const T* theta = pull_load(static_cast<const S*>(param.theta[k]) + at, tile, size);
      for (int64_t i = 0; i < size; ++i) distance[i] = farther(distance[i], theta[i], first[i]);
    }
    for (int64_t i = 0; i < size; ++i) mean[i] = mean_of(first[i], distance[i], share);
    for (size_t k = 0; k < replicas; ++k) {
      S* data = static_cast<S*>(param.theta[k]) + at;
      const T* theta = pull_load(data, tile, size);
      T* result = sizeof(S) == sizeof(T) ? reinterpret_cast<T*>(data) : tile;
#pragma GCC ivdep
      for (int64_t i = 0; i < size; ++i) result[i] = pulled(theta[i], mean[i], alpha);
      pull_store(tile, data, size);
    }
  }
}

void pull_range(const Replicated& param, const Pull& pull, int64_t begin, int64_t n) {
  with_storage(param.dtype, [&]<typename S>() {
    using T = typename Arithmetic<S>::type;
    pull_tiles<S, T>(param, static_cast<T>(pull.share), static_cast<T>(pull.alpha), begin, n);
  });
}
