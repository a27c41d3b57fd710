// The CUDA kernel's work for one thread of one block, which runs on the host too (see
// cuda/body.h).
#pragma once

#include <cstdint>

#include "convert.h"
#include "cuda/body.h"
#include "cuda/pull_cuda.h"
#include "update.h"

// So many replicas stay in registers between the sum and the pull; further ones are read a second
// time, from the cache.
constexpr int kKeptReplicas = 4;

// `count` consecutive elements of every replica.
template <typename S, int count, typename T = typename Arithmetic<S>::type>
struct Across {
  using V = Vector<S, count>;
  V kept[kKeptReplicas];

  RBWA_INLINE void load(void* const* theta, int replicas, int64_t at) {
#pragma unroll
    for (int k = 0; k < kKeptReplicas; ++k) {
      if (k < replicas) kept[k] = *of(theta[k], at);
    }
  }

  RBWA_INLINE void pull(void* const* theta, int replicas, T share, T alpha, int64_t at) {
    T mean[count];
#pragma unroll
    for (int i = 0; i < count; ++i) mean[i] = T(0);
#pragma unroll
    for (int k = 1; k < kKeptReplicas; ++k) {
      if (k < replicas) add(kept[k], mean);
    }
#pragma unroll 1
    for (int k = kKeptReplicas; k < replicas; ++k) {
      const V further = *of(theta[k], at);  // a copy: nvcc would read its elements one by one
      add(further, mean);
    }
#pragma unroll
    for (int i = 0; i < count; ++i) mean[i] = mean_of(widen(kept[0].at[i]), mean[i], share);
#pragma unroll
    for (int k = 0; k < kKeptReplicas; ++k) {
      if (k < replicas) move(kept[k], mean, alpha), store(kept[k], of(theta[k], at));
    }
#pragma unroll 1
    for (int k = kKeptReplicas; k < replicas; ++k) {
      V again = *of(theta[k], at);
      move(again, mean, alpha);
      store(again, of(theta[k], at));
    }
  }

 private:
  static RBWA_INLINE void store(const V& vector, V* to) {
#if defined(__CUDA_ARCH__)
    if constexpr (count > 1) {  // as one access: nvcc takes a plain assignment apart
      const uint4 v = *reinterpret_cast<const uint4*>(&vector);
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                   "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                   : "memory");
      return;
    }
#endif
    *to = vector;
  }
  static RBWA_INLINE V* of(void* theta, int64_t at) {
    return reinterpret_cast<V*>(static_cast<S*>(theta) + at);
  }
  RBWA_INLINE void add(const V& theta, T (&distance)[count]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      distance[i] = farther(distance[i], widen(theta.at[i]), widen(kept[0].at[i]));
    }
  }
  static RBWA_INLINE void move(V& theta, const T (&mean)[count], T alpha) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      narrow(pulled(widen(theta.at[i]), mean[i], alpha), theta.at[i]);
    }
  }
};

// The work of one thread: vectors, two of each replica in flight (16-bit ones hold twice the
// elements, so one), then what is left element by element.
template <typename S, typename T = typename Arithmetic<S>::type>
RBWA_INLINE void pull_thread(const PullLaunch<T>& launch, int64_t block, int thread) {
  const auto* params = reinterpret_cast<const CudaReplicated*>(launch.tables);
  int low = 0;
  for (int high = launch.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (params[middle].first_chunk <= block ? low : high) = middle;
  }
  const CudaReplicated& p = params[low];
  void* const* theta =
      reinterpret_cast<void* const*>(launch.tables + launch.addresses_at) + p.first_address;
  const int64_t begin = (block - p.first_chunk) * kSmallChunk;
  const int64_t end = p.length - begin < kSmallChunk ? p.length : begin + kSmallChunk;
  const int replicas = launch.replicas;

  constexpr int count = kVectorBytes / sizeof(S);
  constexpr int flight = kNarrow<S> ? 1 : 2;
  constexpr int64_t stride = count * kThreads;
  int64_t done = begin;
  if (p.vectors != 0) {
    done = end - (end - begin) % count;
    for (int64_t first = begin + thread * count; first < done; first += flight * stride) {
      Across<S, count> across[flight];
#pragma unroll
      for (int f = 0; f < flight; ++f) {
        if (first + f * stride < done) across[f].load(theta, replicas, first + f * stride);
      }
#pragma unroll
      for (int f = 0; f < flight; ++f) {
        const int64_t at = first + f * stride;
        if (at < done) across[f].pull(theta, replicas, launch.share, launch.alpha, at);
      }
    }
  }
#pragma unroll 1
  for (int64_t at = done + thread; at < end; at += kThreads) {
    Across<S, 1> across;
    across.load(theta, replicas, at);
    across.pull(theta, replicas, launch.share, launch.alpha, at);
  }
}
