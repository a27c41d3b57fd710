// The CPU kernel: one parallel region over the chunks of all segments, and in it the loop of
// cpu/loop.h, compiled for three instruction sets and chosen when the library is loaded.
// Every header stands before the first target pragma: a function compiled for a larger instruction
// set and shared with the baseline build would crash older processors.

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "convert.h"
#include "dispatch.h"
#include "norm.h"
#include "replicas.h"
#include "step.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "update.h"

namespace {

namespace baseline {
#include "cpu/loop.h"
#include "cpu/norm_loop.h"
#include "cpu/pull_loop.h"
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RBWA_X86
#define RBWA_F16C
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "cpu/loop.h"
#include "cpu/norm_loop.h"
#include "cpu/pull_loop.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#define RBWA_AVX512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#include "cpu/loop.h"
#include "cpu/norm_loop.h"
#include "cpu/pull_loop.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Capability {
  const char* name;
  bool available;
  void (*range)(const Segment&, const Row&, const Aging<double>&, const Sampling&, int64_t begin,
                int64_t n);
  void (*range_of_all)(Segment, const Row&, const Aging<double>&, Sampling, int64_t begin,
                       int64_t n);  // averages, where there are several
  void (*pull)(const Replicated&, const Pull&, int64_t begin, int64_t n);
  void (*squares)(const Summed&, int64_t first, int64_t count, double* sums);
  double (*sums)(const double* sums, int64_t n);
};

const Capability kCapabilities[] = {
#if defined(RBWA_X86)
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("f16c"),
     avx512::range, avx512::range_of_all, avx512::pull_range, avx512::squares, avx512::sums},
    {"avx2",
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c"),
     avx2::range, avx2::range_of_all, avx2::pull_range, avx2::squares, avx2::sums},
#endif
    {"baseline", true, baseline::range, baseline::range_of_all, baseline::pull_range,
     baseline::squares, baseline::sums},
};

const Capability* best_capability() {
  return std::find_if(std::begin(kCapabilities), std::end(kCapabilities),
                      [](const Capability& c) { return c.available; });
}

std::atomic<const Capability*> chosen = best_capability();  // a step reads it without the GIL

// Work is dealt out in chunks of one segment, so threads share it by elements and every chunk but
// a segment's last starts on the segment's own alignment.
constexpr int64_t kChunk = 1024;
// A parallel region costs a few microseconds; an element that is in cache 0.3 ns (float32).
constexpr int64_t kWorthThreads = 1 << 15;  // elements

struct Work {
  const Segment* segments;
  const Row* rows;
  const Aging<double>* agings;  // of each segment; none where no kind reads them
  const Sampling* samplings;
  const int64_t* first_chunk;  // of each segment, and after the last one their total
  int64_t count;
  const Capability* capability;
};

void step_chunks(int64_t begin, int64_t end, void* context) {
  const Work& work = *static_cast<const Work*>(context);
  const int64_t* after = std::upper_bound(work.first_chunk, work.first_chunk + work.count, begin);
  for (int64_t i = after - work.first_chunk - 1; i < work.count && begin < end; ++i) {
    const Segment& segment = work.segments[i];
    const int64_t stop = std::min(end, work.first_chunk[i + 1]);
    const int64_t from = (begin - work.first_chunk[i]) * kChunk;
    const int64_t to = std::min(segment.length, (stop - work.first_chunk[i]) * kChunk);
    const Row& row = work.rows[segment.row];
    const Aging<double> aging = work.agings != nullptr ? work.agings[i] : Aging<double>{};
    const Sampling& sampling = work.samplings[segment.sampling];
    if (segment.further_count > 0) {
      work.capability->range_of_all(segment, row, aging, sampling, from, to - from);
    } else {
      work.capability->range(segment, row, aging, sampling, from, to - from);
    }
    begin = stop;
  }
}

// What its age makes of each segment's row; nothing where no kind reads it.
std::vector<Aging<double>> agings_of(const Segment* segments, int64_t count, const Row* rows) {
  const auto reads = [](const Segment& s) { return is_adam(s.kind); };
  if (std::none_of(segments, segments + count, reads)) return {};
  std::vector<Aging<double>> agings(count);
  for (int64_t i = 0; i < count; ++i) {
    const Segment &s = segments[i], &before = segments[i > 0 ? i - 1 : 0];
    const bool known = i > 0 && s.row == before.row && s.age == before.age && s.kind == before.kind;
    agings[i] = known ? agings[i - 1] : aging_of(s.kind, rows[s.row].numbers, s.age);
  }
  return agings;
}

}  // namespace

void step_cpu(const Segment* segments, int64_t count, const Row* rows, const Sampling* samplings) {
  std::vector<int64_t> first_chunk(count + 1, 0);
  int64_t elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    first_chunk[i + 1] = first_chunk[i] + (segments[i].length + kChunk - 1) / kChunk;
    elements += segments[i].length;
  }
  const std::vector<Aging<double>> agings = agings_of(segments, count, rows);
  const int64_t chunks = first_chunk[count];
  const int64_t chunks_a_thread = elements < kWorthThreads ? chunks : 1;
  const Aging<double>* of_each = agings.empty() ? nullptr : agings.data();
  Work work{segments, rows, of_each, samplings, first_chunk.data(), count, chosen};
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, chunks, chunks_a_thread, step_chunks, &work));
}

void pull_range_cpu(const Replicated& param, const Pull& pull, int64_t begin, int64_t n) {
  chosen.load()->pull(param, pull, begin, n);
}

void squares_cpu(const Summed& grad, int64_t first, int64_t count, double* sums) {
  chosen.load()->squares(grad, first, count, sums);
}

double sums_cpu(const double* sums, int64_t n) { return chosen.load()->sums(sums, n); }

const char* cpu_capability() { return chosen.load()->name; }

bool set_cpu_capability(const char* name) {
  for (const Capability& c : kCapabilities) {
    if (c.available && std::strcmp(c.name, name) == 0) {
      chosen = &c;
      return true;
    }
  }
  return false;
}
