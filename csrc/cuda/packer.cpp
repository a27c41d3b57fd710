#include "cuda/packer.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace {

// Fills one launch after the other. Segments grow from the start of its tables; groups and
// samplings, of which there are few, are collected and stand behind them.
template <typename T>
class Packer {
 public:
  Packer(KernelKey key, const CudaStep& step, int64_t chunk) : key_(key), step_(step) {
    launch_.samplings = static_cast<const T*>(device_samplings());
    launch_.marks = step.marks;
    launch_.grad_scale = step.grad_scale;
    launch_.found_inf = step.found_inf;
    launch_.clip = step.clip;
    launch_.chunk = chunk;
  }

  const char* add(const Segment& s, int32_t index) {
    const int64_t chunks = (s.length + launch_.chunk - 1) / launch_.chunk;
    if (chunks == 0) return nullptr;
    const char* error = nullptr;
    if (bytes_with(s) > kTableBytes || chunks_ + chunks > kMostChunks) error = flush();
    const int64_t group = s.row / kRowsPerGroup;
    const auto [place, is_new] = group_of_.try_emplace(group, groups_.size());
    if (is_new) groups_.push_back(group_at(group));
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
    own.kind = static_cast<uint8_t>(s.kind);
    own.first = static_cast<uint8_t>(s.row % kRowsPerGroup);
    segments_.push_back(own);
    chunks_ += chunks;
    return error;
  }

  // Launches what is collected.
  const char* flush() {
    if (segments_.empty()) return nullptr;
    unsigned char* at = launch_.tables;
    at = put(at, segments_);
    launch_.groups_at = static_cast<int32_t>(at - launch_.tables);
    at = put(at, groups_);
    launch_.samplings_at = static_cast<int32_t>(at - launch_.tables);
    at = put(at, samplings_);
    launch_.segment_count = static_cast<int32_t>(segments_.size());
    launch_.blocks_at = 0;
    if (launch_form.block_table) at = put_blocks(at);
    launch_.end = launch_form.small ? static_cast<int32_t>(at - launch_.tables) : kTableBytes;
    const char* error = step_cuda(key_, &launch_, chunks_, step_.stream);
    segments_.clear(), groups_.clear(), samplings_.clear();
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
    const bool new_group = !group_of_.count(s.row / kRowsPerGroup);
    const bool new_sampling = !sampling_of_.count(s.sampling) && launch_.samplings == nullptr;
    return (segments_.size() + 1) * sizeof(CudaSegment) +
           (groups_.size() + new_group) * sizeof(CudaGroup<T>) +
           (samplings_.size() + new_sampling) * sizeof(CudaSampling<T>);
  }

  CudaGroup<T> group_at(int64_t group) const {
    const Row* rows = step_.rows + kRowsPerGroup * group;
    return {rounded<Numbers<T>, T>(rows[0].numbers), rounded<Numbers<T>, T>(rows[1].numbers),
            step_.lrs[group]};
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
  std::vector<CudaGroup<T>> groups_;
  std::vector<CudaSampling<T>> samplings_;
  std::map<int64_t, size_t> group_of_, sampling_of_;
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

using Dtypes = std::tuple<Dtype, Dtype, Dtype>;  // of the parameter, theta and the average
using Members = std::map<Dtypes, std::vector<int32_t>>;

// A narrow parameter without an average goes with those that have a float32 one, which saves a
// launch: to the kernel a missing average is a null pointer.
void join_those_without_average(Members& members, const std::vector<Segment>& segments) {
  for (auto own = members.begin(); own != members.end();) {
    const Dtype dtype = std::get<0>(own->first);
    const auto wide = members.find({dtype, dtype, Dtype::kFloat32});
    const bool movable = is_narrow(dtype) && own->first == Dtypes{dtype, dtype, dtype} &&
                         wide != members.end() &&
                         std::all_of(own->second.begin(), own->second.end(),
                                     [&](int32_t i) { return segments[i].a == nullptr; });
    if (movable) wide->second.insert(wide->second.end(), own->second.begin(), own->second.end());
    own = movable ? members.erase(own) : std::next(own);
  }
}

}  // namespace

LaunchForm launch_form;

const char* step_in_launches(const std::vector<Segment>& segments, const CudaStep& step) {
  Members members;
  int64_t elements = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    elements += s.length;
    if (s.g != nullptr || s.a != nullptr) {
      const Dtype average = s.a != nullptr ? s.a_dtype : s.theta_dtype;
      members[{s.dtype, s.theta_dtype, average}].push_back(static_cast<int32_t>(i));
    }
  }
  join_those_without_average(members, segments);
  const int64_t chunk = elements < kLargeModel ? kSmallChunk : kLargeChunk;
  for (const auto& [dtypes, own] : members) {
    const auto [dtype, theta_dtype, a_dtype] = dtypes;
    KernelKey key{dtype, theta_dtype, a_dtype, Kind::kPlain, false};
    for (const int32_t i : own) {
      key.averaged |= segments[i].a != nullptr;
      key.most = std::max(key.most, segments[i].kind);
    }
    const char* error = dtype == Dtype::kFloat64 ? pack<double>(key, segments, own, step, chunk)
                                                 : pack<float>(key, segments, own, step, chunk);
    if (error != nullptr) return error;
  }
  return nullptr;
}
