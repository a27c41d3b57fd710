#include "cuda/packer.h"

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

namespace {

// Fills one launch after the other. Segments grow from the start of its tables; groups and
// samplings, of which there are few, are collected and stand behind them.
template <typename T>
class Packer {
 public:
  Packer(KernelKey key, const CudaStep& step, int64_t chunk) : key_(key), step_(step) {
    launch_.samplings = static_cast<const T*>(device_samplings());
    launch_.marks = step.marks;
    launch_.agings = static_cast<Aging<T>*>(step.agings);
    launch_.grad_scale = step.grad_scale;
    launch_.found_inf = step.found_inf;
    launch_.clip = step.clip;
    launch_.chunk = chunk;
  }

  const char* add(const Segment& s, int32_t index) {
    int64_t chunks = (s.length + launch_.chunk - 1) / launch_.chunk;
    if (chunks == 0 && launch_.marks == nullptr) return nullptr;
    chunks = std::max<int64_t>(chunks, 1);  // a block makes an empty segment older
    const char* error = nullptr;
    if (bytes_with(s) > kTableBytes || chunks_ + chunks > kMostChunks) error = flush();
    const auto [place, is_new] = group_of_.try_emplace(group_of(s), groups_.size());
    if (is_new) groups_.push_back(group_at(s));
    CudaSegment own{};
    own.theta = s.theta, own.param = s.param, own.g = const_cast<void*>(s.g), own.a = s.a;
#define RBWA_PLACE(stream, when) own.stream = s.stream;
    RBWA_KEPT(RBWA_PLACE)
#undef RBWA_PLACE
    own.length = s.length;
    own.first_chunk = static_cast<int32_t>(chunks_);
    own.index = index;
    own.group = static_cast<uint16_t>(place->second);
    own.sampling = sampling_at(s.sampling);
    own.kind = static_cast<uint8_t>(served_by(s.kind));
    own.first = static_cast<uint8_t>(s.row % kRowsPerGroup);
    if (s.further_count > 0) {
      own.further = static_cast<uint16_t>(further_.size());
      if (s.a != nullptr) further_.push_back({s.a, own.sampling, 0});
    }
    for (int64_t i = 0; i < s.further_count; ++i) {
      const Further& f = s.further[i];
      further_.push_back({f.a, sampling_at(f.sampling), i == s.further_count - 1});
    }
    segments_.push_back(own);
    chunks_ += chunks;
    return error;
  }

  // Launches what is collected.
  const char* flush() {
    if (segments_.empty()) return nullptr;
    unsigned char* at = launch_.tables;
    at = put(at, segments_);
    launch_.further_at = static_cast<int32_t>(at - launch_.tables);
    at = put(at, further_);
    launch_.groups_at = static_cast<int32_t>(at - launch_.tables);
    at = put(at, groups_);
    launch_.samplings_at = static_cast<int32_t>(at - launch_.tables);
    at = put(at, samplings_);
    launch_.segment_count = static_cast<int32_t>(segments_.size());
    launch_.blocks_at = 0;
    if (launch_form.block_table) at = put_blocks(at);
    launch_.end = launch_form.small ? static_cast<int32_t>(at - launch_.tables) : kTableBytes;
    const bool ages = is_adam(key_.most) && launch_.agings != nullptr;
    const char* error = ages ? age_cuda(key_, &launch_, step_.stream) : nullptr;
    if (error == nullptr) error = step_cuda(key_, &launch_, chunks_, step_.stream);
    segments_.clear(), further_.clear(), groups_.clear(), samplings_.clear();
    group_of_.clear(), sampling_of_.clear();
    chunks_ = 0;
    return error;
  }

 private:
  static constexpr int64_t kMostChunks = 1 << 30;  // a grid has 2^31 - 1 blocks

  const void* device_samplings() const {
    if constexpr (sizeof(T) == 8) return step_.device_samplings;
    return step_.device_samplings_float;
  }

  size_t bytes_with(const Segment& s) const {
    const bool new_group = !group_of_.count(group_of(s));
    int64_t new_samplings = 0;
    if (launch_.samplings == nullptr) {
      new_samplings = !sampling_of_.count(s.sampling) + s.further_count;  // at most
    }
    return (segments_.size() + 1) * sizeof(CudaSegment) +
           (further_.size() + 1 + s.further_count) * sizeof(CudaFurther) +
           (groups_.size() + new_group) * sizeof(CudaGroup<T>) +
           (samplings_.size() + new_samplings) * sizeof(CudaSampling<T>);
  }

  // A param group, and the age of the segment where the host says what it makes of the row.
  std::pair<int64_t, int64_t> group_of(const Segment& s) const {
    return {s.row / kRowsPerGroup, is_adam(s.kind) && launch_.marks == nullptr ? s.age : -1};
  }

  CudaGroup<T> group_at(const Segment& s) const {
    const int64_t group = s.row / kRowsPerGroup;
    const Row* rows = step_.rows + kRowsPerGroup * group;
    const Numbers<double>& usual = rows[0].numbers;
    return {rounded<Numbers<T>, T>(usual),
            rounded<Numbers<T>, T>(rows[1].numbers),
            rounded<Aging<T>, T>(aging_of(s.kind, usual, s.age)),
            usual.eta,
            usual.rho,
            usual.mu,
            usual.nu,
            step_.lrs[group],
            step_.schedules != nullptr ? step_.schedules + group : nullptr};
  }

  // The place in the launch's samplings, or in the device's.
  uint16_t sampling_at(int64_t sampling) {
    if (launch_.samplings != nullptr) return static_cast<uint16_t>(sampling);
    const auto [place, is_new] = sampling_of_.try_emplace(sampling, samplings_.size());
    const Sampling& a = step_.samplings[sampling];
    if (is_new) samplings_.push_back(rounded<CudaSampling<T>, T>(a));
    return static_cast<uint16_t>(place->second);
  }

  template <typename Rows>
  static unsigned char* put(unsigned char* at, const Rows& rows) {
    const size_t bytes = rows.size() * sizeof(rows[0]);
    const auto* from = reinterpret_cast<const unsigned char*>(rows.data());
    return std::copy(from, from + bytes, at);
  }

  // Each block's segment, if all of them fit.
  unsigned char* put_blocks(unsigned char* at) {
    const int64_t left = launch_.tables + kTableBytes - at;
    if (chunks_ * static_cast<int64_t>(sizeof(uint16_t)) > left) return at;
    launch_.blocks_at = static_cast<int32_t>(at - launch_.tables);
    auto* blocks = reinterpret_cast<uint16_t*>(at);
    for (size_t i = 0; i < segments_.size(); ++i) {
      const int64_t after = i + 1 < segments_.size() ? segments_[i + 1].first_chunk : chunks_;
      blocks = std::fill_n(blocks, after - segments_[i].first_chunk, static_cast<uint16_t>(i));
    }
    return reinterpret_cast<unsigned char*>(blocks);
  }

  KernelKey key_;
  const CudaStep& step_;
  Launch<T> launch_;
  std::vector<CudaSegment> segments_;
  std::vector<CudaFurther> further_;
  std::vector<CudaGroup<T>> groups_;
  std::vector<CudaSampling<T>> samplings_;
  std::map<std::pair<int64_t, int64_t>, size_t> group_of_;
  std::map<int64_t, size_t> sampling_of_;
  int64_t chunks_ = 0;
};

template <typename T>
const char* pack(const KernelKey& key, const std::vector<Segment>& segments,
                 const std::vector<int32_t>& members, const CudaStep& step, int64_t chunk) {
  Packer<T> packer(key, step, chunk);
  const char* error = nullptr;
  for (const int32_t i : members) {
    if (error == nullptr) error = packer.add(segments[i], i);
  }
  return error != nullptr ? error : packer.flush();
}

// What the segments of one launch have in common; `kinds` is their family (dispatch.h).
struct Streams {
  Dtype dtype, theta;
  bool several;  // averages
  std::optional<int> kinds;
  std::optional<Dtype> kept, average;
};
struct Members {
  Streams streams;
  std::vector<int32_t> own;  // segments
};

Streams streams_of(const Segment& s) {
  Streams streams{s.dtype, s.theta_dtype, s.further_count > 0, {}, {}, {}};
  if (s.kind != Kind::kSample) streams.kinds = family(s.kind);
  if (keeps_any(s.kind)) streams.kept = s.kept_dtype;
  if (s.a != nullptr || s.further_count > 0) streams.average = s.a_dtype;
  return streams;
}

int lacking(const Streams& s) { return !s.kinds + !s.kept + !s.average; }

template <typename T>
bool joins(const std::optional<T>& own, const std::optional<T>& other) {
  return !own || own == other;
}

// Segments that lack something go with others that have it, which saves a launch: to the kernel a
// missing stream is a null pointer.
std::vector<Members> launches_of(const std::vector<Segment>& segments) {
  std::vector<Members> launches;
  for (int lacks = 0; lacks <= 3; ++lacks) {
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& s = segments[i];
      const Streams own = streams_of(s);
      if (lacking(own) != lacks || (s.kind == Kind::kSample && !own.average)) continue;
      auto found = std::find_if(launches.begin(), launches.end(), [&](const Members& launch) {
        const Streams& other = launch.streams;
        return own.dtype == other.dtype && own.theta == other.theta &&
               own.several == other.several && joins(own.kinds, other.kinds) &&
               joins(own.kept, other.kept) && joins(own.average, other.average);
      });
      if (found == launches.end()) found = launches.insert(found, {own, {}});
      found->own.push_back(static_cast<int32_t>(i));
    }
  }
  return launches;
}

}  // namespace

LaunchForm launch_form;

const char* step_in_launches(const std::vector<Segment>& segments, const CudaStep& step) {
  int64_t elements = 0;
  for (const Segment& s : segments) elements += s.length;
  const int64_t chunk = elements < kLargeModel ? kSmallChunk : kLargeChunk;
  for (const auto& [streams, own] : launches_of(segments)) {
    const Dtype theta = streams.theta;
    KernelKey key{streams.dtype,
                  theta,
                  streams.kept.value_or(theta),
                  streams.average.value_or(theta),
                  Kind::kPlain,
                  false,
                  streams.several};
    for (const int32_t i : own) {
      key.averaged |= segments[i].a != nullptr || streams.several;
      key.most = std::max(key.most, served_by(segments[i].kind));
    }
    const bool wider = key.kept_dtype != key.theta_dtype;
    if (step.schedules != nullptr && key.most == Kind::kDecoupled &&
        !reads_schedules(key.most, wider)) {
      key.most = Kind::kDifference;  // whose kernels serve kDecoupled, too
    }
    const char* error = key.dtype == Dtype::kFloat64 ? pack<double>(key, segments, own, step, chunk)
                                                     : pack<float>(key, segments, own, step, chunk);
    if (error != nullptr) return error;
  }
  return nullptr;
}
