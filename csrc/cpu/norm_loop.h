// The CPU loops of norm.h. cpu/step_cpu.cpp includes this file behind cpu/loop.h, once per
// instruction set; it has no include guard and includes nothing.

struct Lanes {
  alignas(kLine) double at[kNormLanes] = {};

  template <typename S>
  void add_squares(const S* g, int64_t n) {
#pragma GCC unroll 4  // a fifth less time or more, see docs/benchmarks.md
    for (int64_t i = 0; i < n; ++i) at[i] += squared(g[i]);
  }
  void add(const double* sums, int64_t n) {
    for (int64_t i = 0; i < n; ++i) at[i] += sums[i];
  }
  double fold() {
    for (int64_t half = kNormLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) at[lane] += at[lane + half];
    }
    return at[0];
  }
};

// One stream of reads alone is left waiting for memory. So a thread reads several chunks at once,
// which lie far apart, and asks for their rows before it needs them; docs/benchmarks.md has what
// was tried.
constexpr int kTogether = 2;
constexpr int kRowsAhead = 4;

// Adds `n` elements, a row of one a lane; those of 16 bits are widened first.
template <typename S>
inline void add_row(Lanes& lanes, const S* row, int64_t n) {
  const char* ahead = reinterpret_cast<const char*>(row) + kRowsAhead * kNormLanes * sizeof(S);
  for (size_t at = 0; at < kNormLanes * sizeof(S); at += kLine) __builtin_prefetch(ahead + at);
  if constexpr (kNarrow<S>) {
    alignas(kLine) float tile[kNormLanes];
    widen(row, tile, n);
    lanes.add_squares(tile, n);
  } else {
    lanes.add_squares(row, n);
  }
}

// The sums of chunks [first, first + count) of a gradient.
template <typename S>
void squares_of(const S* g, int64_t length, int64_t first, int64_t count, double* sums) {
  const int64_t whole = length / kNormChunk - first < count ? length / kNormChunk - first : count;
  const int64_t apart = whole / kTogether;  // chunks
  for (int64_t chunk = 0; chunk < apart; ++chunk) {
    Lanes lanes[kTogether];
    for (int64_t row = 0; row < kNormChunk; row += kNormLanes) {
      for (int64_t k = 0; k < kTogether; ++k) {
        add_row(lanes[k], g + (first + chunk + k * apart) * kNormChunk + row, kNormLanes);
      }
    }
    for (int64_t k = 0; k < kTogether; ++k) sums[chunk + k * apart] = lanes[k].fold();
  }
  for (int64_t chunk = kTogether * apart; chunk < count; ++chunk) {
    Lanes lanes;
    const int64_t begin = (first + chunk) * kNormChunk;
    const int64_t end = length - begin < kNormChunk ? length : begin + kNormChunk;
    for (int64_t row = begin; row < end; row += kNormLanes) {
      add_row(lanes, g + row, end - row < kNormLanes ? end - row : kNormLanes);
    }
    sums[chunk] = lanes.fold();
  }
}

void squares(const Summed& grad, int64_t first, int64_t count, double* sums) {
  with_storage(grad.dtype, [&]<typename S>() {
    squares_of(static_cast<const S*>(grad.g), grad.length, first, count, sums);
  });
}

double sums(const double* sums, int64_t n) {
  Lanes lanes;
  for (int64_t row = 0; row < n; row += kNormLanes) {
    lanes.add(sums + row, n - row < kNormLanes ? n - row : kNormLanes);
  }
  return lanes.fold();
}
