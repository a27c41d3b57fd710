// What a launch is made of, from run time into template parameters: once for the CPU, CUDA and its
// emulation in the tests.
#pragma once

#include "convert.h"
#include "update.h"

// On the host alone, and part of its caller's instruction set.
#define RBWA_HOST inline __attribute__((always_inline))

// Calls work<S>() with the storage of a dtype.
template <typename Work>
RBWA_HOST auto with_storage(Dtype dtype, const Work& work) {
  switch (dtype) {
#define RBWA_CASE(name, storage, ...) \
  case Dtype::name:                   \
    return work.template operator()<storage>();
    RBWA_DTYPES(RBWA_CASE)
#undef RBWA_CASE
  }
  __builtin_unreachable();
}

// Calls work<kind>().
template <typename Work>
RBWA_HOST auto with_kind(Kind kind, const Work& work) {
  switch (kind) {
#define RBWA_CASE(name) \
  case Kind::name:      \
    return work.template operator()<Kind::name>();
    RBWA_KINDS(RBWA_CASE)
#undef RBWA_CASE
  }
  __builtin_unreachable();
}

// The kind whose branch of a kernel serves a kind: decoupled decay of 0 is none, and one kernel is
// compiled for both. (A row of kMomentum has a rho of 0.)
RBWA_INLINE constexpr Kind served_by(Kind kind) {
  return kind == Kind::kMomentum ? Kind::kDecoupled : kind;
}

// The kinds of one family may share a launch.
RBWA_INLINE constexpr int family(Kind kind) {
  return kind == Kind::kScheduleFree ? 2 : is_adam(kind) ? 1 : 0;
}

// Whether one launch may have segments of a kind where the last of those that serve it is `most`:
// kernels have branches for all of them, and hold the registers that the last one needs.
RBWA_INLINE constexpr bool goes_with(Kind kind, Kind most) {
  return kind == Kind::kSample || (kind <= most && family(kind) == family(most));
}

// What distinguishes one compiled CUDA kernel from another: the streams of memory.
struct KernelKey {
  Dtype dtype, theta_dtype, kept_dtype, a_dtype;  // as in Segment
  Kind most;                                      // of the segments' kinds, but at least kPlain
  bool averaged;
  bool several;  // averages, of each segment
};

// Whether kinds may keep what they keep in float32 beside 16-bit weights.
constexpr bool keeps_wide(Kind kind) { return decouples(served_by(kind)); }

// Whether a CUDA kernel reads numbers that the device prepared for a group (schedule.h): those of
// the kinds that only schedule-free groups have, and, for schedule-free SGD, those of explicit
// RSGDM. All others of kDecoupled would hold registers for it that momentum does not need.
RBWA_INLINE constexpr bool reads_schedules(Kind most, bool keeps_wider) {
  return most == Kind::kDifference || most == Kind::kScheduleFree ||
         (most == Kind::kDecoupled && keeps_wider);
}

// Calls work<S, W, M, A, most, averaged>(): the storage of parameter and gradient, that of what the
// step works on (S, or float for a master), of what it keeps, and of the average.
template <typename Work>
auto with_kernel(const KernelKey& key, const Work& work) {
  auto with_most = [&]<typename S, typename W, typename A, bool has_average>() {
    return with_kind(key.most, [&]<Kind most>() {
      constexpr Kind of_launch = most == Kind::kSample ? Kind::kPlain : served_by(most);
      // Adam's need few registers more for an average, and much time to compile.
      constexpr bool averaged = has_average || is_adam(of_launch);
      if constexpr (keeps_wide(of_launch) && kNarrow<W>) {
        if (of_launch == Kind::kScheduleFree || key.kept_dtype == Dtype::kFloat32) {
          return work.template operator()<S, W, float, A, of_launch, averaged>();
        }
      }
      if constexpr (of_launch != Kind::kScheduleFree || !kNarrow<W>) {
        return work.template operator()<S, W, W, A, of_launch, averaged>();
      }
    });
  };
  return with_storage(key.dtype, [&]<typename S>() {
    if constexpr (kNarrow<S>) {
      if (key.theta_dtype == Dtype::kFloat32) {
        if (!key.averaged) return with_most.template operator()<S, float, float, false>();
        return with_most.template operator()<S, float, float, true>();
      }
      if (key.averaged && key.a_dtype == Dtype::kFloat32) {
        return with_most.template operator()<S, S, float, true>();
      }
    }
    if (!key.averaged) return with_most.template operator()<S, S, S, false>();
    return with_most.template operator()<S, S, S, true>();
  });
}

// Calls work<S, W, M, A, most>() for a launch of several averages. Fewer kernels serve those: what
// a segment's averages cost is more than what a kernel with fewer branches would save.
template <typename Work>
auto with_several(const KernelKey& key, const Work& work) {
  return with_kernel(
      key, [&]<typename S, typename W, typename M, typename A, Kind most, bool averaged>() {
        constexpr Kind merged = most == Kind::kPlain  ? Kind::kDecoupled
                                : most == Kind::kAdam ? Kind::kAmsgrad
                                                      : most;
        return work.template operator()<S, W, M, A, merged>();
      });
}
