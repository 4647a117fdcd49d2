// The grouped expert FFN on CPU as an XLA custom call: experts_cpu.py builds and registers it.
//
// XLA:CPU copies each expert's matrices out of the pool before it multiplies by them; here they
// are read where they lie, once for all the rows of a block. Decode then runs near the memory's
// speed. Plain loops: the compiler vectorises them over the contiguous axis.

#include <algorithm>
#include <atomic>
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

// Rows that read an expert's weights together: their sums stay in the first-level cache.
constexpr int64_t kBlockRows = 24;
// Weight rows multiplied in one pass over the sums: fewer loads and stores of the sums.
constexpr int64_t kDepth = 8;

inline float ToFloat(float value) { return value; }
inline float ToFloat(uint16_t bfloat16) {
  uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// sum[r, n] += x[r, m] * w[m, n], one row of `sum` at a time over kDepth rows of w.
//   x: rows of `depth` floats; w: `depth` rows, `stride` apart; sum: rows of `width` floats.
template <typename T>
void MultiplyAdd(const float* x, const T* w, int64_t stride, float* sum, int64_t rows,
                 int64_t depth, int64_t width) {
  int64_t m = 0;
  for (; m + kDepth <= depth; m += kDepth) {
    const T* __restrict w0 = w + m * stride;
    const T* __restrict w1 = w0 + stride;
    const T* __restrict w2 = w1 + stride;
    const T* __restrict w3 = w2 + stride;
    const T* __restrict w4 = w3 + stride;
    const T* __restrict w5 = w4 + stride;
    const T* __restrict w6 = w5 + stride;
    const T* __restrict w7 = w6 + stride;
    for (int64_t r = 0; r < rows; ++r) {
      const float* xr = x + r * depth + m;
      const float x0 = xr[0], x1 = xr[1], x2 = xr[2], x3 = xr[3];
      const float x4 = xr[4], x5 = xr[5], x6 = xr[6], x7 = xr[7];
      float* __restrict out = sum + r * width;
      for (int64_t n = 0; n < width; ++n) {
        float s = out[n];
        s += x0 * ToFloat(w0[n]);
        s += x1 * ToFloat(w1[n]);
        s += x2 * ToFloat(w2[n]);
        s += x3 * ToFloat(w3[n]);
        s += x4 * ToFloat(w4[n]);
        s += x5 * ToFloat(w5[n]);
        s += x6 * ToFloat(w6[n]);
        s += x7 * ToFloat(w7[n]);
        out[n] = s;
      }
    }
  }
  for (; m < depth; ++m) {
    const T* __restrict row = w + m * stride;
    for (int64_t r = 0; r < rows; ++r) {
      const float xm = x[r * depth + m];
      float* __restrict out = sum + r * width;
      for (int64_t n = 0; n < width; ++n) out[n] += xm * ToFloat(row[n]);
    }
  }
}

template <typename T>
struct Layer {
  const T *w_gate, *w_up, *w_down;  // [s, d, f], [s, d, f], [s, f, d]
  const T* x;                       // [n, d]
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
  float* x = scratch.data();
  float* gate = x + task.rows * d;
  float* up = gate + task.rows * width;
  float* sum = up + task.rows * width;
  for (int64_t r = 0; r < task.rows; ++r) {
    const T* row = layer.x + order[task.begin + r] / layer.k * d;
    for (int64_t i = 0; i < d; ++i) x[r * d + i] = ToFloat(row[i]);
  }
  const int64_t expert = task.slot * d * layer.f;
  MultiplyAdd(x, layer.w_gate + expert + task.f_begin, layer.f, gate, task.rows, d, width);
  MultiplyAdd(x, layer.w_up + expert + task.f_begin, layer.f, up, task.rows, d, width);
  for (int64_t i = 0; i < task.rows * width; ++i) {
    gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  }
  MultiplyAdd(gate, layer.w_down + expert + task.f_begin * d, d, sum, task.rows, width, d);
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

template <typename T>
void Run(ffi::ThreadPool& pool, const Layer<T>& layer, int64_t slots, const int32_t* slot_nk,
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
      whole == 0 ? 0 : std::clamp<int64_t>(2 * threads / whole, 1, std::max<int64_t>(layer.f, 1));
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
}

template <ffi::DataType kType>
ffi::Error GroupedFfn(ffi::ThreadPool pool, ffi::Buffer<kType, 3> w_gate,
                      ffi::Buffer<kType, 3> w_up, ffi::Buffer<kType, 3> w_down,
                      ffi::Buffer<kType, 2> x, ffi::Buffer<ffi::S32, 2> slot,
                      ffi::Buffer<ffi::F32, 2> weight, ffi::ResultBuffer<ffi::F32, 2> y) {
  using T = std::conditional_t<kType == ffi::F32, float, uint16_t>;
  auto data = [](auto& buffer) { return static_cast<const T*>(buffer.untyped_data()); };
  const auto shape = w_gate.dimensions(), rows = slot.dimensions();
  Layer<T> layer{data(w_gate), data(w_up), data(w_down), data(x),
                 rows[0],      shape[1],   shape[2],     rows[1]};
  Run(pool, layer, shape[0], slot.typed_data(), weight.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

template <ffi::DataType kType>
auto Binding() {
  return ffi::Ffi::Bind()
      .template Ctx<ffi::ThreadPool>()
      .template Arg<ffi::Buffer<kType, 3>>()
      .template Arg<ffi::Buffer<kType, 3>>()
      .template Arg<ffi::Buffer<kType, 3>>()
      .template Arg<ffi::Buffer<kType, 2>>()
      .template Arg<ffi::Buffer<ffi::S32, 2>>()
      .template Arg<ffi::Buffer<ffi::F32, 2>>()
      .template Ret<ffi::Buffer<ffi::F32, 2>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedFfnFloat32, GroupedFfn<ffi::F32>, Binding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedFfnBfloat16, GroupedFfn<ffi::BF16>, Binding<ffi::BF16>());
