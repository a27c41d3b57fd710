// The work of one thread where a segment has several averages: lines (1)-(3) of body.h, and then
// lines (4)-(6) for one average after the other, while the weights are in registers. Part of
// cuda/body.h, which includes it.
#pragma once

// The averages of a segment, of one chunk. Only the first may be written back.
template <typename A, typename T>
struct Averages {
  const CudaFurther* first;
  const CudaSampling<T>*host, *device;
  int64_t begin;  // the chunk's first element in its segment

  // Calls work(a, sampling) for each that this step samples.
  template <typename Work>
  RBWA_INLINE void each(const Work& work) const {
    for (const CudaFurther* f = first;; ++f) {
      const CudaSampling<T>* own = (device != nullptr ? device : host) + f->sampling;
      if (own->sample != 0) work(static_cast<A*>(f->a) + begin, *own);
      if (f->last) return;
    }
  }
};

// Whether all vectors of the averages lie on their boundaries, and none of them begins now: that
// happens once in a run, and would hold registers for the weights before the step.
template <typename A, typename T>
RBWA_INLINE bool by_vectors(const Averages<A, T>& averages) {
  bool all = true;
  averages.each([&](A* a, const CudaSampling<T>& sampling) {
    all &= sampling.current == 0 && widest(a) == kVectorBytes;
  });
  return all;
}

// An average `a` that samples the weight x, and what the weight is then. Line (6) is that of a
// segment without a gradient.
template <typename T>
RBWA_INLINE Element<T> sampled(const CudaSampling<T>& sampling, T a, T x) {
  Coefficients<T> k{};
  k.w = sampling.w, k.write_back = sampling.write_back != 0;
  Element<T> e{};
  e.theta = x, e.a = a;
  update<Kind::kSample, true>(k, e);
  return e;
}

template <Kind kind, typename S, typename W, typename M, typename A, typename T>
RBWA_INLINE void sample_one(const Chunk<S, W, M, A>& chunk, const Coefficients<T>& k,
                            const Unscale<T>& u, const Averages<A, T>& averages, int64_t i) {
  Moved<T> moved = one<kind, false>(chunk, k, u, i);
  bool written = false;
  averages.each([&](A* stream, const CudaSampling<T>& sampling) {
    const T a = sampling.current != 0 ? moved.before : widen(stream[i]);
    const Element<T> e = sampled(sampling, a, moved.x);
    narrow(e.a, stream[i]);
    moved.x = e.theta;
    written |= sampling.write_back != 0;
  });
  if (!written) return;
  if constexpr (kHasMaster<S, W>) narrow(moved.x, chunk.theta[i]);
  narrow(moved.x, weights(chunk)[i]);
}

// Whole vectors, of which one is in flight: averages take the registers of another.
template <Kind kind, typename S, typename W, typename M, typename A, typename T>
RBWA_INLINE void sample_vectors(const Chunk<S, W, M, A>& chunk, const Coefficients<T>& k,
                                const Unscale<T>& u, const Averages<A, T>& averages, int thread) {
  constexpr int count = kVectorBytes / sizeof(S);
  using Kept = Vectors<M, sizeof(M) / sizeof(S)>;
  const int g_bytes = kind == Kind::kSample ? 0 : widest(chunk.g);
#pragma unroll 1
  for (int64_t vector = thread; vector < chunk.n / count; vector += kThreads) {
    Vectors<W, sizeof(W) / sizeof(S)> theta;
    Vectors<S, 1> param;
    Vector<S, count> g;
    theta.load(chunk.theta, vector);
    if constexpr (kHasMaster<S, W>) param.load(chunk.param, vector);
    if constexpr (kind != Kind::kSample) load_gradient(chunk.g + vector * count, g_bytes, g);
#define RBWA_LOAD(stream, when) \
  [[maybe_unused]] Kept stream; \
  if constexpr (keeps_##stream(kind)) stream.load(chunk.stream, vector);
    RBWA_KEPT(RBWA_LOAD)
#undef RBWA_LOAD
    T x[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      Chunk<S, W, M, A> element;
      element.theta = theta.at(i), element.param = param.at(i), element.g = &g.at[i];
#define RBWA_AT(stream, when) element.stream = stream.at(i);
      RBWA_KEPT(RBWA_AT)
#undef RBWA_AT
      x[i] = one<kind, false>(element, k, u, 0).x;
    }
    if constexpr (kind != Kind::kSample) {
      if (u.scaled) store_gradient(chunk.g + vector * count, g_bytes, g);
    }
#define RBWA_STORE(stream, when) \
  if constexpr (keeps_##stream(kind)) stream.store(chunk.stream, vector);
    RBWA_KEPT(RBWA_STORE)
#undef RBWA_STORE
    bool written = kind != Kind::kSample;
    averages.each([&](A* stream, const CudaSampling<T>& sampling) {
      Vectors<A, sizeof(A) / sizeof(S)> a;
      a.load(stream, vector);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const Element<T> e = sampled(sampling, widen(*a.at(i)), x[i]);
        narrow(e.a, *a.at(i));
        x[i] = e.theta;
      }
      a.store(stream, vector);
      written |= sampling.write_back != 0;
    });
#pragma unroll
    for (int i = 0; i < count; ++i) {
      narrow(x[i], *theta.at(i));
      if constexpr (kHasMaster<S, W>) narrow(x[i], *param.at(i));
    }
    if (written || kHasMaster<S, W>) theta.store(chunk.theta, vector);
    if constexpr (kHasMaster<S, W>) {
      if (written) param.store(chunk.param, vector);
    }
  }
}

// As `run`.
template <Kind kind, typename S, typename W, typename M, typename A, typename T>
RBWA_INLINE void run_several(const Chunk<S, W, M, A>& chunk, const Coefficients<T>& k,
                             const Unscale<T>& u, const Averages<A, T>& averages, int thread) {
  constexpr int count = kVectorBytes / sizeof(S);
  int64_t done = 0;
  if (written_on_boundaries<kind, false>(chunk) && by_vectors(averages)) {
    sample_vectors<kind>(chunk, k, u, averages, thread);
    done = chunk.n - chunk.n % count;
  }
#pragma unroll 1
  for (int64_t i = done + thread; i < chunk.n; i += kThreads) {
    sample_one<kind>(chunk, k, u, averages, i);
  }
}

// As `run_kind`.
template <Kind most, typename S, typename W, typename M, typename A, typename T>
RBWA_INLINE void run_kind_several(Kind kind, const Chunk<S, W, M, A>& chunk,
                                  const Coefficients<T>& k, const Unscale<T>& u,
                                  const Averages<A, T>& averages, int thread) {
#define RBWA_RUN(name)                                                                     \
  if constexpr (served_by(Kind::name) == Kind::name && goes_with(Kind::name, most)) {      \
    if (kind == Kind::name) return run_several<Kind::name>(chunk, k, u, averages, thread); \
  }
  RBWA_KINDS(RBWA_RUN)
#undef RBWA_RUN
}
