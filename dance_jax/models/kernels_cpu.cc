// Products with weights on CPU as XLA custom calls: kernels_cpu.py builds and registers them.
//
// The grouped expert FFN: XLA:CPU copies each expert's matrices out of the pool before it multiplies
// by them; here they are read where they lie, once for all the rows of a block. And plain products:
// for few rows XLA:CPU reads the weights on one thread, or packs them anew in every step.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Rows that read an expert's weights together: two of the largest tiles.
constexpr int64_t kBlockRows = 24;
// Columns of a task of Linear.
constexpr int64_t kBlockColumns = 128;
// Bytes of weights that are worth waking a thread for.
constexpr int64_t kWorthAThread = 1 << 18;

// Weight rows that are asked of the memory ahead of their use.
constexpr int64_t kAhead = 32;
// Weight rows that some tiles read in full before the next ones.
constexpr int64_t kChunk = 16;
// With fewer rows than this the products wait for the memory, not for the processor.
constexpr int64_t kFewRows = 12;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
using Vector = float __attribute__((vector_size(4 * kLanes)));

inline float ToFloat(float value) { return value; }
inline float ToFloat(uint16_t bfloat16) {
  uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline Vector Load(const float* from) {
  Vector values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
inline Vector Load(const uint16_t* from) {
  using Half = uint16_t __attribute__((vector_size(2 * kLanes)));
  using Word = uint32_t __attribute__((vector_size(4 * kLanes)));
  Half halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Word) << 16);
}

// One product: out[r, n] += sum over m of x[r, m] * w[m, n].
//   m counts to `depth`; rows of x, w and out are so many values apart.
template <typename T>
struct Product {
  const float* x;
  const T* w;
  float* out;
  int64_t depth, x_stride, w_stride, out_stride;
};

// R rows and C vectors of columns of a product, whose sums stay in registers.
template <typename T, int R, int C>
void Tile(const Product<T>& p) {
  Vector sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = Load(p.out + r * p.out_stride + c * kLanes);
  }
  for (int64_t m = 0; m < p.depth; ++m) {
    Vector w[C];
    for (int c = 0; c < C; ++c) {
      w[c] = Load(p.w + m * p.w_stride + c * kLanes);
      __builtin_prefetch(p.w + (m + kAhead) * p.w_stride + c * kLanes);
    }
    for (int r = 0; r < R; ++r) {
      const float x = p.x[r * p.x_stride + m];
      for (int c = 0; c < C; ++c) sum[r][c] += x * w[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    std::memcpy(p.out + r * p.out_stride, sum[r], sizeof(sum[r]));
  }
}

// R rows of a product, as wide tiles as fit.
template <typename T, int R, int C>
void Rows(Product<T> p, int64_t width) {
  for (; width >= C * kLanes; width -= C * kLanes, p.w += C * kLanes, p.out += C * kLanes) {
    Tile<T, R, C>(p);
  }
  if constexpr (C > 1) {
    Rows<T, R, C / 2>(p, width);
  } else {
    for (int64_t n = 0; n < width; ++n) {
      for (int r = 0; r < R; ++r) {
        float sum = p.out[r * p.out_stride + n];
        for (int64_t m = 0; m < p.depth; ++m) {
          sum += p.x[r * p.x_stride + m] * ToFloat(p.w[m * p.w_stride + n]);
        }
        p.out[r * p.out_stride + n] = sum;
      }
    }
  }
}

// All rows of a product, by tiles of full depth. Few rows take wide tiles, so that the weights are
// read nearly in their order.
template <typename T>
void AllRows(Product<T> p, int64_t rows, int64_t width) {
  auto take = [&](auto run, int64_t count) {
    for (; rows >= count; rows -= count, p.x += count * p.x_stride, p.out += count * p.out_stride) {
      run(p, width);
    }
  };
#if defined(__AVX512F__)
  take(Rows<T, 12, 2>, 12);
  take(Rows<T, 8, 2>, 8);
  take(Rows<T, 4, 4>, 4);
  take(Rows<T, 3, 8>, 3);
  take(Rows<T, 2, 8>, 2);
  take(Rows<T, 1, 16>, 1);
#else
  take(Rows<T, 6, 2>, 6);
  take(Rows<T, 3, 4>, 3);
  take(Rows<T, 2, 4>, 2);
  take(Rows<T, 1, 8>, 1);
#endif
}

// A product. Between a few rows and many, tiles are narrow and yet wait for the memory: there it is
// better to read kChunk whole rows of weights after the other.
template <typename T>
void Multiply(Product<T> p, int64_t rows, int64_t width) {
  if (rows < 4 || rows >= kFewRows) return AllRows(p, rows, width);
  for (int64_t left = p.depth; left > 0; left -= kChunk, p.x += kChunk, p.w += kChunk * p.w_stride) {
    p.depth = std::min(left, kChunk);
    AllRows(p, rows, width);
  }
}

// What an expert computes between its projections (models/config.py).
struct Activation {
  enum Kind : int32_t { kSilu = 0, kGelu = 1, kClamped = 2 } kind;
  float alpha, limit;

  // gate[i] becomes the activation of gate[i] and up[i].
  void Apply(float* gate, const float* up, int64_t count) const {
    switch (kind) {
      case kSilu:
        for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
        return;
      case kGelu:
        for (int64_t i = 0; i < count; ++i) {
          const float g = gate[i];
          const float inner = 0.7978845608028654f * (g + 0.044715f * g * g * g);
          gate[i] = 0.5f * g * (1.0f + std::tanh(inner)) * up[i];
        }
        return;
      case kClamped:
        for (int64_t i = 0; i < count; ++i) {
          const float g = std::min(gate[i], limit), u = std::clamp(up[i], -limit, limit);
          gate[i] = g / (1.0f + std::exp(-alpha * g)) * (u + 1.0f);
        }
        return;
    }
  }
};

template <typename T>
struct Layer {
  const T *w_gate, *w_up, *w_down;  // [s, d, f], [s, d, f], [s, f, d]
  // [s, f], [s, f], [s, d], or null: there are none.
  const float *b_gate, *b_up, *b_down;
  Activation activation;
  const T* x;  // [n, d]
  int64_t n, d, f, k;
};

// Some rows of one expert, and the part [f_begin, f_end) of its inner width.
struct Task {
  int64_t slot, begin, rows, f_begin, f_end;
  float* out;  // [assignments, d], of this part of the width
};

// out[a] = FFN(x[a / k]) for the assignments a of a task.
template <typename T>
void RunTask(const Layer<T>& layer, const Task& task, const std::vector<int32_t>& order) {
  thread_local std::vector<float> scratch;
  const int64_t d = layer.d, width = task.f_end - task.f_begin;
  scratch.assign(task.rows * (2 * d + 2 * width), 0.0f);
  // Rows of a product begin with the bias; of the parts of a cut expert the first one adds b_down.
  auto begin_with = [&](float* rows, const float* bias, int64_t count) {
    if (bias == nullptr) return;
    for (int64_t r = 0; r < task.rows; ++r) std::memcpy(rows + r * count, bias, count * sizeof(float));
  };
  float* x = scratch.data();
  float* gate = x + task.rows * d;
  float* up = gate + task.rows * width;
  float* sum = up + task.rows * width;
  for (int64_t r = 0; r < task.rows; ++r) {
    const T* row = layer.x + order[task.begin + r] / layer.k * d;
    for (int64_t i = 0; i < d; ++i) x[r * d + i] = ToFloat(row[i]);
  }
  const int64_t expert = task.slot * d * layer.f;
  const T* w_gate = layer.w_gate + expert + task.f_begin;
  const T* w_up = layer.w_up + expert + task.f_begin;
  const T* w_down = layer.w_down + expert + task.f_begin * d;
  if (layer.b_gate != nullptr) {
    begin_with(gate, layer.b_gate + task.slot * layer.f + task.f_begin, width);
    begin_with(up, layer.b_up + task.slot * layer.f + task.f_begin, width);
    if (task.f_begin == 0) begin_with(sum, layer.b_down + task.slot * d, d);
  }
  Multiply<T>({x, w_gate, gate, d, d, layer.f, width}, task.rows, width);
  Multiply<T>({x, w_up, up, d, d, layer.f, width}, task.rows, width);
  layer.activation.Apply(gate, up, task.rows * width);
  Multiply<T>({gate, w_down, sum, width, width, d, d}, task.rows, d);
  for (int64_t r = 0; r < task.rows; ++r) {
    std::memcpy(task.out + order[task.begin + r] * d, sum + r * d, d * sizeof(float));
  }
}

// Calls run(i) for i in [0, count) on the caller and the pool's other threads. The caller works
// too and waits only for what others have begun, so a pool with no free thread cannot hang it.
template <typename Run>
void ParallelFor(ffi::ThreadPool& pool, int64_t count, const Run& run) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  auto work = [state, count, &run] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      run(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// The layer's sums; returns the assignments that have a slot.
template <typename T>
int64_t Run(ffi::ThreadPool& pool, const Layer<T>& layer, int64_t slots, const int32_t* slot_nk,
            const float* weight_nk, float* y_nd) {
  const int64_t assignments = layer.n * layer.k, d = layer.d;
  // Assignments sorted by slot (a counting sort); those without a slot are left out.
  std::vector<int32_t> end(slots + 1, 0);
  for (int64_t a = 0; a < assignments; ++a) {
    if (slot_nk[a] >= 0) ++end[slot_nk[a] + 1];
  }
  for (int64_t s = 0; s < slots; ++s) end[s + 1] += end[s];
  std::vector<int32_t> begin(end.begin(), end.end() - 1), order(end[slots]);
  std::vector<int32_t> next = begin;
  for (int64_t a = 0; a < assignments; ++a) {
    if (slot_nk[a] >= 0) order[next[slot_nk[a]]++] = static_cast<int32_t>(a);
  }

  std::vector<Task> tasks;
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t rows = end[s + 1] - begin[s];
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = rows * b / blocks, last = rows * (b + 1) / blocks;
      tasks.push_back({s, begin[s] + first, last - first, 0, layer.f, nullptr});
    }
  }
  // Fewer experts than threads: each is cut across its width, and the parts are added below.
  const int64_t whole = tasks.size(), threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t parts =
      whole == 0 ? 0 : std::clamp<int64_t>(threads / whole, 1, std::max<int64_t>(layer.f, 1));
  std::unique_ptr<float[]> out(new float[parts * assignments * d]);
  std::vector<Task> cut;
  for (int64_t p = 0; p < parts; ++p) {
    for (Task task : tasks) {
      task.f_begin = layer.f * p / parts;
      task.f_end = layer.f * (p + 1) / parts;
      task.out = out.get() + p * assignments * d;
      cut.push_back(task);
    }
  }
  ParallelFor(pool, cut.size(), [&](int64_t i) { RunTask(layer, cut[i], order); });

  const int64_t chunk = 16;
  ParallelFor(pool, (layer.n + chunk - 1) / chunk, [&](int64_t c) {
    for (int64_t n = c * chunk; n < std::min(layer.n, (c + 1) * chunk); ++n) {
      float* __restrict y = y_nd + n * d;
      std::fill(y, y + d, 0.0f);
      for (int64_t a = n * layer.k; a < (n + 1) * layer.k; ++a) {
        if (slot_nk[a] < 0) continue;
        for (int64_t p = 0; p < parts; ++p) {
          const float* __restrict row = out.get() + (p * assignments + a) * d;
          for (int64_t i = 0; i < d; ++i) y[i] += weight_nk[a] * row[i];
        }
      }
    }
  });
  return end[slots];
}

// Calls for routed experts in this process, the time in them, and the assignments they computed.
std::atomic<int64_t> routed_calls{0}, routed_ns{0}, routed_assignments{0};

// routed: the experts are those that a router chose. biases: of gate, up and down, or none at all.
template <ffi::DataType kType>
ffi::Error GroupedFfn(ffi::ThreadPool pool, bool routed, int32_t activation, float alpha,
                      float limit, ffi::Buffer<kType, 3> w_gate, ffi::Buffer<kType, 3> w_up,
                      ffi::Buffer<kType, 3> w_down, ffi::Buffer<kType, 2> x, ffi::Buffer<ffi::S32, 2> slot,
                      ffi::Buffer<ffi::F32, 2> weight, ffi::RemainingArgs biases,
                      ffi::ResultBuffer<ffi::F32, 2> y) {
  using T = std::conditional_t<kType == ffi::F32, float, uint16_t>;
  auto data = [](auto& buffer) { return static_cast<const T*>(buffer.untyped_data()); };
  const auto shape = w_gate.dimensions(), rows = slot.dimensions();
  const float* bias[3] = {nullptr, nullptr, nullptr};
  for (size_t i = 0; i < biases.size(); ++i) {
    const auto buffer = biases.get<ffi::Buffer<ffi::F32, 2>>(i);
    if (i >= 3 || !buffer.has_value()) {
      return ffi::Error::InvalidArgument("biases: three of float32 [s, width] are expected");
    }
    bias[i] = buffer->typed_data();
  }
  Layer<T> layer{data(w_gate), data(w_up), data(w_down), bias[0], bias[1], bias[2],
                 {static_cast<Activation::Kind>(activation), alpha, limit},
                 data(x), rows[0], shape[1], shape[2], rows[1]};
  const auto start = std::chrono::steady_clock::now();
  const int64_t assignments =
      Run(pool, layer, shape[0], slot.typed_data(), weight.typed_data(), y->typed_data());
  if (routed) {
    ++routed_calls;
    routed_assignments += assignments;
    routed_ns += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  }
  return ffi::Error::Success();
}

// y = x @ w, summed in float32. Few rows: each thread reads a run of the weights' rows. Many: blocks
// of rows and columns.
template <ffi::DataType kType>
ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<kType, 2> x, ffi::Buffer<kType, 2> w,
                  ffi::ResultBuffer<ffi::F32, 2> y) {
  using T = std::conditional_t<kType == ffi::F32, float, uint16_t>;
  const int64_t n = x.dimensions()[0], d = x.dimensions()[1], f = w.dimensions()[1];
  const T* x_nd = static_cast<const T*>(x.untyped_data());
  const T* w_df = static_cast<const T*>(w.untyped_data());
  float* y_nf = y->typed_data();
  std::vector<float> wide;
  if constexpr (!std::is_same_v<T, float>) {
    wide.resize(n * d);
    for (int64_t i = 0; i < n * d; ++i) wide[i] = ToFloat(x_nd[i]);
  }
  const float* rows_nd = wide.empty() ? reinterpret_cast<const float*>(x_nd) : wide.data();
  std::fill(y_nf, y_nf + n * f, 0.0f);
  if (n < kFewRows) {
    const int64_t parts = std::clamp<int64_t>(d * f * sizeof(T) / kWorthAThread, 1,
                                              std::max<int64_t>(pool.num_threads(), 1));
    std::vector<float> sums((parts - 1) * n * f, 0.0f);
    ParallelFor(pool, parts, [&](int64_t i) {
      const int64_t first = d * i / parts, last = d * (i + 1) / parts;
      float* out = i == 0 ? y_nf : sums.data() + (i - 1) * n * f;
      Multiply<T>({rows_nd + first, w_df + first * f, out, last - first, d, f, f}, n, f);
    });
    for (int64_t i = 0; i < (parts - 1) * n * f; ++i) y_nf[i % (n * f)] += sums[i];
    return ffi::Error::Success();
  }
  const int64_t columns = (f + kBlockColumns - 1) / kBlockColumns;
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
  ParallelFor(pool, columns * blocks, [&](int64_t i) {
    const int64_t column = i / blocks * kBlockColumns, row = i % blocks * kBlockRows;
    Multiply<T>({rows_nd + row * d, w_df + column, y_nf + row * f + column, d, d, f, f},
                std::min(kBlockRows, n - row), std::min(kBlockColumns, f - column));
  });
  return ffi::Error::Success();
}

template <ffi::DataType kType>
auto LinearBinding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<kType, 2>>()
      .template Arg<ffi::Buffer<kType, 2>>()
      .template Ret<ffi::Buffer<ffi::F32, 2>>();
}

template <ffi::DataType kType>
auto GroupedFfnBinding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Attr<bool>("routed")
      .template Attr<int32_t>("activation")
      .template Attr<float>("alpha")
      .template Attr<float>("limit")
      .template Arg<ffi::Buffer<kType, 3>>()
      .template Arg<ffi::Buffer<kType, 3>>()
      .template Arg<ffi::Buffer<kType, 3>>()
      .template Arg<ffi::Buffer<kType, 2>>()
      .template Arg<ffi::Buffer<ffi::S32, 2>>()
      .template Arg<ffi::Buffer<ffi::F32, 2>>()
      .RemainingArgs()
      .template Ret<ffi::Buffer<ffi::F32, 2>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedFfnFloat32, GroupedFfn<ffi::F32>,
                              GroupedFfnBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedFfnBfloat16, GroupedFfn<ffi::BF16>,
                              GroupedFfnBinding<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(LinearFloat32, Linear<ffi::F32>, LinearBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(LinearBfloat16, Linear<ffi::BF16>, LinearBinding<ffi::BF16>());

// counters [3]: calls for routed experts, ns in them, and assignments that they computed.
extern "C" void KernelsCounters(int64_t* counters) {
  counters[0] = routed_calls.load();
  counters[1] = routed_ns.load();
  counters[2] = routed_assignments.load();
}
