// The ceiling: the streams of a step on contiguous buffers, in a plain parallel loop on torch's
// own thread pool. No segments, no checks, no tail. A kernel that reaches its time is bound by
// memory and by nothing else.

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <type_traits>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 15;  // elements; fewer are not worth a second thread

template <typename T, typename A>
struct Streams {
  T* theta;
  const T* g;
  T* m;
  T* v;
  A* a;
  T lambda, mu, eta;
  A w;
};

template <bool momentum, bool squares, bool averaged, typename T, typename A>
void loop(int64_t begin, int64_t end, void* context) {
  const Streams<T, A> s = *static_cast<const Streams<T, A>*>(context);
  T* __restrict theta = s.theta;
  const T* __restrict g = s.g;
  T* __restrict m = s.m;
  T* __restrict v = s.v;
  A* __restrict a = s.a;
  for (int64_t i = begin; i < end; ++i) {
    T direction = g[i] + s.lambda * theta[i];
    if constexpr (momentum) m[i] = direction = s.mu * m[i] + direction;
    if constexpr (squares) v[i] = s.mu * v[i] + direction * direction;
    const T x = theta[i] - s.eta * direction;
    if constexpr (averaged) a[i] += s.w * (A(x) - a[i]);
    theta[i] = x;
  }
}

// 16-bit streams are moved as integers: their conversion is arithmetic, and arithmetic is what the
// ceiling leaves out. Their average is float32, as the library's.
template <typename T>
void step(const Tensor& theta, const Tensor& g, const std::optional<Tensor>& m,
          const std::optional<Tensor>& v, const std::optional<Tensor>& a, double lambda, double mu,
          double eta, double w) {
  using A = std::conditional_t<std::is_integral_v<T>, float, T>;
  Streams<T, A> streams{static_cast<T*>(theta.data_ptr()),
                        static_cast<const T*>(g.data_ptr()),
                        m ? static_cast<T*>(m->data_ptr()) : nullptr,
                        v ? static_cast<T*>(v->data_ptr()) : nullptr,
                        a ? static_cast<A*>(a->data_ptr()) : nullptr,
                        T(lambda),
                        T(mu),
                        T(eta),
                        A(w)};
  auto* body = v   ? loop<true, true, true, T, A>
               : m ? (a ? loop<true, false, true, T, A> : loop<true, false, false, T, A>)
                   : (a ? loop<false, false, true, T, A> : loop<false, false, false, T, A>);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, theta.numel(), kGrain, body, &streams));
}

void ceiling(Tensor theta, Tensor g, std::optional<Tensor> m, std::optional<Tensor> v,
             std::optional<Tensor> a, double lambda, double mu, double eta, double w) {
  STD_TORCH_CHECK(!v || (m && a), "ceiling: v goes with m and a");
  switch (theta.scalar_type()) {
    case ScalarType::Float:
      return step<float>(theta, g, m, v, a, lambda, mu, eta, w);
    case ScalarType::Double:
      return step<double>(theta, g, m, v, a, lambda, mu, eta, w);
    default:
      STD_TORCH_CHECK(theta.scalar_type() == ScalarType::Short, "ceiling: unexpected dtype");
      return step<int16_t>(theta, g, m, v, a, lambda, mu, eta, w);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(rbwa_benchmarks, library) {
  library.def(
      "ceiling(Tensor(a!) theta, Tensor g, Tensor(b!)? m, Tensor(c!)? v, Tensor(d!)? a, "
      "float weight_decay, float momentum, float lr, float w) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rbwa_benchmarks, CPU, library) {
  library.impl("ceiling", TORCH_BOX(&ceiling));
}
