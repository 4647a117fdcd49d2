// The native products for XLA, as custom calls, and for Python, as C functions: __init__.py loads
// and registers them.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "experts.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dance {
namespace {

using Rows = ffi::Buffer<ffi::F32, 2>;
using Slots = ffi::Buffer<ffi::S32, 2>;
using Numbers = ffi::Buffer<ffi::S32, 1>;
using Formats = ffi::Span<const int64_t>;
// Of a matrix, or of one for each head.
using Panels = ffi::Buffer<ffi::U8>;

Matrix MakeMatrix(const Format& format, int64_t in, int64_t out, const uint8_t* panels) {
  Matrix matrix;
  matrix.format = format, matrix.in = in, matrix.out = out;
  matrix.panels = reinterpret_cast<const char*>(panels);
  return matrix;
}

ffi::Error OtherBytes() {
  return ffi::Error::InvalidArgument("a matrix has other bytes than its format says");
}

// y = x @ w; or for each head h, y[:, h] = x[:, h] @ w[h], where x is [n, h, in].
ffi::Error LinearCall(Formats words, ffi::Buffer<ffi::F32> x, Panels panels,
                      ffi::ResultBuffer<ffi::F32> y) {
  const auto from = x.dimensions(), to = y->dimensions();
  const int64_t n = from[0], heads = from.size() == 3 ? from[1] : 1;
  const int64_t in = from.back(), out = to.back();
  const Matrix w = MakeMatrix(ReadFormat(words.begin()), in, out, panels.typed_data());
  if (static_cast<int64_t>(panels.element_count()) != heads * w.Bytes()) return OtherBytes();
  if (heads == 1) {
    RunProduct(w, x.typed_data(), n, in, y->typed_data(), out);
    return ffi::Error::Success();
  }
  const Kernels& kernels = ForThisProcessor();
  auto head = [&](int64_t h) {
    Matrix own = w;
    own.panels += h * w.Bytes();
    float* sums = y->typed_data() + h * out;
    for (int64_t r = 0; r < n; ++r) std::fill(sums + r * heads * out, sums + r * heads * out + out, 0.0f);
    kernels.multiply(own, x.typed_data() + h * in, n, heads * in, 0, out, sums, heads * out);
  };
  if (n * heads * in * out < (1 << 16)) {
    for (int64_t h = 0; h < heads; ++h) head(h);
  } else {
    Threads::Get().For(heads, head);
  }
  return ffi::Error::Success();
}

// y [t, in] = what the weights of the outputs `chosen` are worth; numbers out of range are the nearest.
ffi::Error ColumnsCall(Formats words, int64_t outputs, Numbers chosen, Panels panels,
                       ffi::Result<Rows> y) {
  const int64_t count = chosen.dimensions()[0], in = y->dimensions()[1];
  const Matrix w = MakeMatrix(ReadFormat(words.begin()), in, outputs, panels.typed_data());
  if (static_cast<int64_t>(panels.element_count()) != w.Bytes()) return OtherBytes();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t output = std::clamp<int64_t>(chosen.typed_data()[t], 0, outputs - 1);
    ForThisProcessor().column(w, output, y->typed_data() + t * in);
  }
  return ffi::Error::Success();
}

// y = down(activation(gate(x), up(x))), all rows through one feed-forward.
ffi::Error GatedMlpCall(Formats words, int32_t activation, float alpha, float limit,
                        int64_t width, Rows x, Panels gate, Panels up, Panels down,
                        ffi::Result<Rows> y) {
  const int64_t n = x.dimensions()[0], d = x.dimensions()[1];
  auto matrix = [&](int part, int64_t in, int64_t out, const Panels& panels) {
    const Format format = ReadFormat(words.begin() + part * kFormatWords);
    return MakeMatrix(format, in, out, panels.typed_data());
  };
  Expert expert;
  expert.gate = matrix(0, d, width, gate);
  expert.up = matrix(1, d, width, up);
  expert.down = matrix(2, width, d, down);
  auto whole = [](const Matrix& w, const Panels& panels) {
    return w.Bytes() == static_cast<int64_t>(panels.element_count());
  };
  if (!whole(expert.gate, gate) || !whole(expert.up, up) || !whole(expert.down, down)) {
    return OtherBytes();
  }
  const std::vector<int32_t> first(n, 0);
  const std::vector<float> ones(n, 1.0f);
  RunExperts(d, {static_cast<Activation::Kind>(activation), alpha, limit}, {&expert},
             {x.typed_data(), first.data(), ones.data(), n, 1}, y->typed_data());
  return ffi::Error::Success();
}

// The pools of this process by their numbers.
std::mutex pools_mutex;
std::map<int64_t, std::shared_ptr<ExpertPool>> pools;
int64_t next_pool = 1;

std::shared_ptr<ExpertPool> FindPool(int64_t number) {
  const std::lock_guard<std::mutex> lock(pools_mutex);
  const auto found = pools.find(number);
  return found == pools.end() ? nullptr : found->second;
}

// Calls for routed experts in this process, the time in them, and the assignments they computed.
std::atomic<int64_t> routed_calls{0}, routed_ns{0}, routed_assignments{0};

// y = the weighted sums of the experts in a pool's slots.
ffi::Error ExpertsCall(ffi::Buffer<ffi::S32> pool, Rows x,
                       Slots slot, Rows weight,
                       ffi::Result<Rows> y) {
  const auto found = FindPool(pool.typed_data()[0]);
  if (!found) return ffi::Error::InvalidArgument("there is no such pool of experts");
  if (found->spec().d != x.dimensions()[1]) {
    return ffi::Error::InvalidArgument("the pool's experts have another width");
  }
  const auto start = std::chrono::steady_clock::now();
  const int64_t assignments = found->Run({x.typed_data(), slot.typed_data(), weight.typed_data(),
                                          slot.dimensions()[0], slot.dimensions()[1]},
                                         y->typed_data());
  ++routed_calls;
  routed_assignments += assignments;
  routed_ns += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dance

using dance::Formats;
using dance::Numbers;
using dance::Panels;
using dance::Rows;
using dance::Slots;

XLA_FFI_DEFINE_HANDLER_SYMBOL(Linear, dance::LinearCall,
                              ffi::Ffi::Bind()
                                  .Attr<Formats>("formats")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<Panels>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Columns, dance::ColumnsCall,
                              ffi::Ffi::Bind()
                                  .Attr<Formats>("formats")
                                  .Attr<int64_t>("outputs")
                                  .Arg<Numbers>()
                                  .Arg<Panels>()
                                  .Ret<Rows>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(GatedMlp, dance::GatedMlpCall,
                              ffi::Ffi::Bind()
                                  .Attr<Formats>("formats")
                                  .Attr<int32_t>("activation")
                                  .Attr<float>("alpha")
                                  .Attr<float>("limit")
                                  .Attr<int64_t>("width")
                                  .Arg<Rows>()
                                  .Arg<Panels>()
                                  .Arg<Panels>()
                                  .Arg<Panels>()
                                  .Ret<Rows>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Experts, dance::ExpertsCall,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Rows>()
                                  .Arg<Slots>()
                                  .Arg<Rows>()
                                  .Ret<Rows>());

extern "C" {

// How many threads share a call; before the first one.
void ThreadsSet(int64_t count) { dance::Threads::Set(count); }

// counters [3]: calls for routed experts, ns in them, and assignments that they computed.
void ExpertsCounters(int64_t* counters) {
  counters[0] = dance::routed_calls.load();
  counters[1] = dance::routed_ns.load();
  counters[2] = dance::routed_assignments.load();
}

// A new pool of empty slots: its number. formats [12] are those of gate, up and down.
int64_t PoolNew(int64_t d, int64_t f, int32_t activation, float alpha, float limit,
                const int64_t* formats, bool bias, int64_t slots) {
  using dance::kFormatWords;
  const dance::ExpertSpec spec{d,
                               f,
                               {static_cast<dance::Activation::Kind>(activation), alpha, limit},
                               dance::ReadFormat(formats),
                               dance::ReadFormat(formats + kFormatWords),
                               dance::ReadFormat(formats + 2 * kFormatWords),
                               bias};
  const std::lock_guard<std::mutex> lock(dance::pools_mutex);
  dance::pools[dance::next_pool] = std::make_shared<dance::ExpertPool>(spec, slots);
  return dance::next_pool++;
}

// Its memory goes when the last call that reads it is done.
void PoolDelete(int64_t pool) {
  const std::lock_guard<std::mutex> lock(dance::pools_mutex);
  dance::pools.erase(pool);
}

// False: there is no such pool or slot.
bool PoolPut(int64_t pool, int64_t slot, const void* const* arrays) {
  const auto found = dance::FindPool(pool);
  if (!found || slot < 0 || slot >= found->slots()) return false;
  found->Put(slot, arrays);
  return true;
}

// False: there is no such pool or slot, or nothing in it.
bool PoolGet(int64_t pool, int64_t slot, void* const* arrays) {
  const auto found = dance::FindPool(pool);
  return found && slot >= 0 && slot < found->slots() && found->Get(slot, arrays);
}

// Bytes of all experts in a pool.
int64_t PoolBytes(int64_t pool) {
  const auto found = dance::FindPool(pool);
  return found ? found->bytes() : 0;
}

}  // extern "C"
