// Pools of experts as an XLA custom call, and C functions for Python.

#include "pools.h"

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dance {
namespace {

// The pools of this process by number.
std::mutex pools_mutex;
std::map<int64_t, std::shared_ptr<ExpertPool>> pools;
int64_t next_pool = 1;

// Calls for routed experts in this process, ns spent in them, and assignments computed.
std::atomic<int64_t> routed_calls{0}, routed_ns{0}, routed_assignments{0};

}  // namespace

std::shared_ptr<ExpertPool> FindPool(int64_t number) {
  const std::lock_guard<std::mutex> lock(pools_mutex);
  const auto found = pools.find(number);
  return found == pools.end() ? nullptr : found->second;
}

void CountRouted(const std::function<int64_t()>& run) {
  const auto start = std::chrono::steady_clock::now();
  routed_assignments += run();
  routed_ns += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  ++routed_calls;
}

namespace {

using Rows = ffi::Buffer<ffi::F32, 2>;
using Slots = ffi::Buffer<ffi::S32, 2>;

// y = the weighted sums of experts in a pool's slots.
ffi::Error ExpertsCall(ffi::Buffer<ffi::S32> pool, Rows x,
                       Slots slot, Rows weight,
                       ffi::Result<Rows> y) {
  const auto found = FindPool(pool.typed_data()[0]);
  if (!found) return ffi::Error::InvalidArgument("no pool has this number");
  if (found->spec().d != x.dimensions()[1]) {
    return ffi::Error::InvalidArgument("the width of the rows does not match the pool's experts");
  }
  CountRouted([&] {
    return found->Run({x.typed_data(), slot.typed_data(), weight.typed_data(),
                       slot.dimensions()[0], slot.dimensions()[1]},
                      y->typed_data());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dance

using dance::Rows;
using dance::Slots;

XLA_FFI_DEFINE_HANDLER_SYMBOL(Experts, dance::ExpertsCall,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Rows>()
                                  .Arg<Slots>()
                                  .Arg<Rows>()
                                  .Ret<Rows>());

extern "C" {

// counters [3]: calls for routed experts, ns spent in them, and assignments computed.
void ExpertsCounters(int64_t* counters) {
  counters[0] = dance::routed_calls.load();
  counters[1] = dance::routed_ns.load();
  counters[2] = dance::routed_assignments.load();
}

// Creates a pool of empty slots and returns its number. formats [12]: those of gate, up and down.
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

// The pool's memory is freed when the last call that reads it is done.
void PoolDelete(int64_t pool) {
  const std::lock_guard<std::mutex> lock(dance::pools_mutex);
  dance::pools.erase(pool);
}

// Returns false if there is no such pool or slot.
bool PoolPut(int64_t pool, int64_t slot, int64_t id, const void* const* arrays) {
  const auto found = dance::FindPool(pool);
  if (!found || slot < 0 || slot >= found->slots()) return false;
  found->Put(slot, id, arrays);
  return true;
}

// Returns false if there is no such pool or slot, or the slot is empty.
bool PoolGet(int64_t pool, int64_t slot, void* const* arrays) {
  const auto found = dance::FindPool(pool);
  return found && slot >= 0 && slot < found->slots() && found->Get(slot, arrays);
}

// Bytes of all experts in a pool. 0 if there is no such pool.
int64_t PoolBytes(int64_t pool) {
  const auto found = dance::FindPool(pool);
  return found ? found->bytes() : 0;
}

}  // extern "C"
