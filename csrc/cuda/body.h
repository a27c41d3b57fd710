// The CUDA kernel's work for one thread of one block: an ordinary function around update.h, which
// runs on the host too, where the tests call it for every block and thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convert.h"
#include "cuda/kernel.h"
#include "update.h"

constexpr int kVectorBytes = 16;

template <typename S, int count>
struct alignas(sizeof(S) * count) Vector {
  S at[count];
};

#if defined(__CUDA_ARCH__)
// Gradients are read once: they need not stay in the cache.
template <typename V>
RBWA_INLINE V load_once(const V* from) {
  V vector;
  if constexpr (sizeof(V) == 16) {
    *reinterpret_cast<uint4*>(&vector) = __ldcs(reinterpret_cast<const uint4*>(from));
  } else if constexpr (sizeof(V) == 8) {
    *reinterpret_cast<uint2*>(&vector) = __ldcs(reinterpret_cast<const uint2*>(from));
  } else if constexpr (sizeof(V) == 4) {
    *reinterpret_cast<unsigned*>(&vector) = __ldcs(reinterpret_cast<const unsigned*>(from));
  } else {
    *reinterpret_cast<unsigned short*>(&vector) =
        __ldcs(reinterpret_cast<const unsigned short*>(from));
  }
  return vector;
}
#else
template <typename V>
RBWA_INLINE V load_once(const V* from) {
  return *from;
}
#endif

// A whole vector of the gradient by accesses of `bytes`, which its address allows.
template <int bytes, typename S, int count>
RBWA_INLINE void load_pieces(const S* from, Vector<S, count>& to) {
  constexpr int piece = bytes / sizeof(S);
  if constexpr (piece > 0) {
#pragma unroll
    for (int i = 0; i < count; i += piece) {
      const auto part = load_once(reinterpret_cast<const Vector<S, piece>*>(from + i));
#pragma unroll
      for (int j = 0; j < piece; ++j) to.at[i + j] = part.at[j];
    }
  }
}

template <int bytes, typename S, int count>
RBWA_INLINE void store_pieces(S* to, const Vector<S, count>& from) {
  constexpr int piece = bytes / sizeof(S);
  if constexpr (piece > 0) {
#pragma unroll
    for (int i = 0; i < count; i += piece) {
      Vector<S, piece> part;
#pragma unroll
      for (int j = 0; j < piece; ++j) part.at[j] = from.at[i + j];
      *reinterpret_cast<Vector<S, piece>*>(to + i) = part;
    }
  }
}

template <typename S, int count>
RBWA_INLINE void load_gradient(const S* from, int bytes, Vector<S, count>& to) {
  if (bytes == 16) return load_pieces<16>(from, to);
  if (bytes == 8) return load_pieces<8>(from, to);
  if (bytes == 4) return load_pieces<4>(from, to);
  load_pieces<2>(from, to);
}

template <typename S, int count>
RBWA_INLINE void store_gradient(S* to, int bytes, const Vector<S, count>& from) {
  if (bytes == 16) return store_pieces<16>(to, from);
  if (bytes == 8) return store_pieces<8>(to, from);
  if (bytes == 4) return store_pieces<4>(to, from);
  store_pieces<2>(to, from);
}

// The widest access of up to 16 bytes that an address allows.
RBWA_INLINE int widest(const void* address) {
  const uintptr_t low = reinterpret_cast<uintptr_t>(address) & (kVectorBytes - 1);
  return low == 0 ? kVectorBytes : static_cast<int>(low & (~low + 1));
}

// One chunk of one segment: addresses of its first element, and how many there are. S is the
// storage of parameter and gradient, W that of what the step works on: S, or float for a master, M
// that of what is kept.
template <typename S, typename W, typename M, typename A>
struct Chunk {
  W* theta;
  S* param;  // only beside a master
  S* g;
  A* a;
#define RBWA_FIELD(stream, when) M* stream;
  RBWA_KEPT(RBWA_FIELD)
#undef RBWA_FIELD
  int64_t n;
};

template <typename S, typename W>
constexpr bool kHasMaster = !std::is_same_v<S, W>;

template <typename S, typename W, typename M, typename A>
RBWA_INLINE S* weights(const Chunk<S, W, M, A>& chunk) {
  if constexpr (kHasMaster<S, W>) {
    return chunk.param;
  } else {
    return chunk.theta;
  }
}

// `unscale` is what the gradient is multiplied by and stored again, if `scaled`.
template <typename T>
struct Unscale {
  bool scaled;
  T unscale;
};

// A weight before and behind its step, in the arithmetic's dtype.
template <typename T>
struct Moved {
  T before, x;
};

template <Kind kind, bool averaged, typename S, typename W, typename M, typename A, typename T>
RBWA_INLINE Moved<T> one(const Chunk<S, W, M, A>& chunk, const Coefficients<T>& k,
                         const Unscale<T>& u, int64_t i) {
  Element<T> e{};
  e.theta = widen(chunk.theta[i]);
  if constexpr (kHasMaster<S, W>) {
    S rounded;
    narrow(e.theta, rounded);
    e.theta = followed(e.theta, widen(rounded), widen(chunk.param[i]));
  }
  if constexpr (kind != Kind::kSample) {
    e.g = widen(chunk.g[i]);
    if (u.scaled) {
      e.g = u.unscale * e.g;
      narrow(e.g, chunk.g[i]);
    }
  }
#define RBWA_LOAD(stream, when) \
  if constexpr (keeps_##stream(kind)) e.stream = widen(chunk.stream[i]);
  RBWA_KEPT(RBWA_LOAD)
#undef RBWA_LOAD
  if constexpr (averaged) e.a = widen(chunk.a[i]);
  begin<kind>(k, e);
  const T before = e.theta;
  update<kind, averaged>(k, e);
  if constexpr (kHasMaster<S, W>) narrow(e.theta, chunk.theta[i]);
  if (writes_weight<kind>(k)) narrow(e.theta, weights(chunk)[i]);
#define RBWA_STORE(stream, when) \
  if constexpr (keeps_##stream(kind)) narrow(e.stream, chunk.stream[i]);
  RBWA_KEPT(RBWA_STORE)
#undef RBWA_STORE
  if constexpr (averaged) narrow(e.a, chunk.a[i]);
  return {before, e.theta};
}

// As many elements of a stream as fill one vector of a gradient's, in `count` vectors of its own.
template <typename X, int count>
struct Vectors {
  static constexpr int kWidth = kVectorBytes / sizeof(X);
  Vector<X, kWidth> part[count];

  RBWA_INLINE void load(const X* stream, int64_t v) {
#pragma unroll
    for (int j = 0; j < count; ++j) {
      part[j] = reinterpret_cast<const Vector<X, kWidth>*>(stream)[v * count + j];
    }
  }
  RBWA_INLINE void store(X* stream, int64_t v) const {
#pragma unroll
    for (int j = 0; j < count; ++j) {
      reinterpret_cast<Vector<X, kWidth>*>(stream)[v * count + j] = part[j];
    }
  }
  RBWA_INLINE X* at(int i) { return &part[i / kWidth].at[i % kWidth]; }
};

// Whole vectors. Two a thread are in flight for 32 and 64 bits; 16-bit types have twice the
// elements in one, and more would spill.
template <Kind kind, bool averaged, typename S, typename W, typename M, typename A, typename T>
RBWA_INLINE void vectors(const Chunk<S, W, M, A>& chunk, const Coefficients<T>& k,
                         const Unscale<T>& u, int thread) {
  constexpr int count = kVectorBytes / sizeof(S);
  constexpr int flight = kNarrow<S> ? 1 : 2;
  using Kept = Vectors<M, sizeof(M) / sizeof(S)>;
  const int64_t whole = chunk.n / count;
  const int g_bytes = kind == Kind::kSample ? 0 : widest(chunk.g);
  for (int64_t first = thread; first < whole; first += flight * kThreads) {
    Vectors<W, sizeof(W) / sizeof(S)> theta[flight];
#define RBWA_VECTORS(stream, when) Kept stream[flight];
    RBWA_KEPT(RBWA_VECTORS)
#undef RBWA_VECTORS
    Vectors<S, 1> param[flight];
    Vector<S, count> g[flight];
    Vectors<A, sizeof(A) / sizeof(S)> a[flight];
#pragma unroll
    for (int f = 0; f < flight; ++f) {
      const int64_t vector = first + f * kThreads;
      if (vector >= whole) continue;
      theta[f].load(chunk.theta, vector);
      if constexpr (kHasMaster<S, W>) param[f].load(chunk.param, vector);
      if constexpr (kind != Kind::kSample) load_gradient(chunk.g + vector * count, g_bytes, g[f]);
#define RBWA_LOAD(stream, when) \
  if constexpr (keeps_##stream(kind)) stream[f].load(chunk.stream, vector);
      RBWA_KEPT(RBWA_LOAD)
#undef RBWA_LOAD
      if constexpr (averaged) a[f].load(chunk.a, vector);
    }
#pragma unroll
    for (int f = 0; f < flight; ++f) {
      const int64_t vector = first + f * kThreads;
      if (vector >= whole) continue;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        Chunk<S, W, M, A> element;
        element.theta = theta[f].at(i), element.param = param[f].at(i), element.g = &g[f].at[i];
        element.a = a[f].at(i);
#define RBWA_AT(stream, when) element.stream = stream[f].at(i);
        RBWA_KEPT(RBWA_AT)
#undef RBWA_AT
        one<kind, averaged>(element, k, u, 0);
      }
      if constexpr (kHasMaster<S, W>) {
        theta[f].store(chunk.theta, vector);
        if (writes_weight<kind>(k)) param[f].store(chunk.param, vector);
      } else {
        if (writes_weight<kind>(k)) theta[f].store(chunk.theta, vector);
      }
      if constexpr (kind != Kind::kSample) {
        if (u.scaled) store_gradient(chunk.g + vector * count, g_bytes, g[f]);
      }
#define RBWA_STORE(stream, when) \
  if constexpr (keeps_##stream(kind)) stream[f].store(chunk.stream, vector);
      RBWA_KEPT(RBWA_STORE)
#undef RBWA_STORE
      if constexpr (averaged) a[f].store(chunk.a, vector);
    }
  }
}

template <Kind kind, bool averaged, typename S, typename W, typename M, typename A>
RBWA_INLINE bool written_on_boundaries(const Chunk<S, W, M, A>& chunk) {
  auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  uintptr_t all = address(chunk.theta);
  if constexpr (kHasMaster<S, W>) all |= address(chunk.param);
#define RBWA_ADDRESS(stream, when) \
  if constexpr (keeps_##stream(kind)) all |= address(chunk.stream);
  RBWA_KEPT(RBWA_ADDRESS)
#undef RBWA_ADDRESS
  if constexpr (averaged) all |= address(chunk.a);
  return all % kVectorBytes == 0;
}

// A chunk goes by vectors if all that is written lies on their boundaries, and its tail, or all of
// it, element by element.
template <Kind kind, bool averaged, typename S, typename W, typename M, typename A, typename T>
RBWA_INLINE void run(const Chunk<S, W, M, A>& chunk, const Coefficients<T>& k, const Unscale<T>& u,
                     int thread) {
  constexpr int count = kVectorBytes / sizeof(S);
  int64_t done = 0;
  if (written_on_boundaries<kind, averaged>(chunk)) {
    vectors<kind, averaged>(chunk, k, u, thread);
    done = chunk.n - chunk.n % count;
  }
  for (int64_t i = done + thread; i < chunk.n; i += kThreads) one<kind, averaged>(chunk, k, u, i);
}

// The branch of a segment's kind, which is the same for a whole block, among those that a launch up
// to `most` may have. A segment without a gradient is touched only where it is sampled.
template <Kind most, bool averaged, typename S, typename W, typename M, typename A, typename T>
RBWA_INLINE void run_kind(Kind kind, const Chunk<S, W, M, A>& chunk, const Coefficients<T>& k,
                          const Unscale<T>& u, int thread) {
#define RBWA_RUN(name)                                                                \
  if constexpr (served_by(Kind::name) == Kind::name && goes_with(Kind::name, most) && \
                (averaged || Kind::name != Kind::kSample)) {                          \
    if (kind == Kind::name) return run<Kind::name, averaged>(chunk, k, u, thread);    \
  }
  RBWA_KINDS(RBWA_RUN)
#undef RBWA_RUN
}

#include "cuda/several.h"

template <typename X>
RBWA_INLINE X* place(void* stream, int64_t element) {
  return stream != nullptr ? static_cast<X*>(stream) + element : nullptr;
}

// Before the step, where the device counts: what its age makes of a segment's row.
template <typename T, int bytes>
RBWA_INLINE void age_thread(const Launch<T, bytes>& launch, int64_t segment) {
  if (segment >= launch.segment_count) return;
  const auto& s = reinterpret_cast<const CudaSegment*>(launch.tables)[segment];
  const auto* groups = reinterpret_cast<const CudaGroup<T>*>(launch.tables + launch.groups_at);
  const CudaGroup<T>& group = groups[s.group];
  Aging<double> row{1, group.eta, group.rho};
  if (group.lr != nullptr) row.eta = *group.lr;
  const Kind kind = static_cast<Kind>(s.kind);
  const auto aging = aging_of(kind, row, group.mu, group.nu, launch.marks[2 * s.index]);
  launch.agings[s.index] = {static_cast<T>(aging.bias), static_cast<T>(aging.eta),
                            static_cast<T>(aging.rho)};
}

// The work of one thread. `most` is the last kind among the launch's segments; with `several` each
// of them has several averages.
template <typename S, typename W, typename M, typename A, Kind most, bool averaged,
          bool several = false, typename T, int bytes>
RBWA_INLINE void step_thread(const Launch<T, bytes>& launch, int64_t block, int thread) {
  if (launch.found_inf != nullptr && *launch.found_inf != 0) return;
  const auto* segments = reinterpret_cast<const CudaSegment*>(launch.tables);
  int low = 0;
  if (launch.blocks_at != 0) {
    low = reinterpret_cast<const uint16_t*>(launch.tables + launch.blocks_at)[block];
  } else {
    for (int high = launch.segment_count; high - low > 1;) {
      const int middle = (low + high) / 2;
      (segments[middle].first_chunk <= block ? low : high) = middle;
    }
  }
  const CudaSegment& s = segments[low];
  const int64_t begin = (block - s.first_chunk) * launch.chunk;
  const int64_t n = s.length - begin < launch.chunk ? s.length - begin : launch.chunk;

  const auto* host_samplings =
      reinterpret_cast<const CudaSampling<T>*>(launch.tables + launch.samplings_at);
  const auto* device_samplings = reinterpret_cast<const CudaSampling<T>*>(launch.samplings);
  const CudaSampling<T> sampling =
      device_samplings != nullptr ? device_samplings[s.sampling] : host_samplings[s.sampling];
  const auto* groups = reinterpret_cast<const CudaGroup<T>*>(launch.tables + launch.groups_at);
  const CudaGroup<T>& group = groups[s.group];
  bool first = false;
  if constexpr (!is_adam(most)) {
    first = launch.marks != nullptr ? launch.marks[2 * s.index] == 0 : s.first != 0;
  }
  Coefficients<T> k{first ? group.first : group.usual, T(1), sampling.w, sampling.current != 0,
                    sampling.write_back != 0,          false};
  if constexpr (is_adam(most)) {
    age(k, launch.agings != nullptr ? launch.agings[s.index] : group.aging);
  } else {
    if (group.lr != nullptr) k.eta = static_cast<T>(*group.lr);
  }
  if constexpr (reads_schedules(most, sizeof(M) > sizeof(W))) {
    if (const Schedule* schedule = group.schedule; schedule != nullptr) {
      k.c = static_cast<T>(schedule->c);
      k.alpha = static_cast<T>(schedule->alpha);
      k.gamma = static_cast<T>(schedule->gamma);
      k.rho = static_cast<T>(schedule->rho);
      k.begins = launch.marks[2 * s.index] == 0;
    }
  }
  k.eta *= sampling.scale;
  if (launch.clip != nullptr) k.s *= static_cast<T>(*launch.clip);
  Unscale<T> u{launch.grad_scale != nullptr, T(1)};
  if (u.scaled) u.unscale = T(1) / static_cast<T>(*launch.grad_scale);

  Chunk<S, W, M, A> chunk;
  chunk.theta = place<W>(s.theta, begin), chunk.param = place<S>(s.param, begin);
  chunk.g = place<S>(s.g, begin), chunk.a = place<A>(s.a, begin);
#define RBWA_PLACE(stream, when) chunk.stream = place<M>(s.stream, begin);
  RBWA_KEPT(RBWA_PLACE)
#undef RBWA_PLACE
  chunk.n = n;
  const Kind kind = static_cast<Kind>(s.kind);
  if (keeps_any(kind) && launch.marks != nullptr && begin == 0 && thread == 0) {
    launch.marks[2 * s.index + 1] = 1;
  }
  if constexpr (several) {
    const auto* all = reinterpret_cast<const CudaFurther*>(launch.tables + launch.further_at);
    const Averages<A, T> own{all + s.further, host_samplings, device_samplings, begin};
    k.write_back = false;  // each average says so itself
    return run_kind_several<most>(kind, chunk, k, u, own, thread);
  }
  if constexpr (averaged) {
    if (s.a != nullptr && sampling.sample != 0) {
      return run_kind<most, true>(kind, chunk, k, u, thread);
    }
  }
  run_kind<most, false>(kind, chunk, k, u, thread);
}
