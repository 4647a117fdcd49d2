// Collectives between the devices of one server, as XLA custom calls; siblings_cpu.py traces them.
//
// XLA:CPU's collectives use the network even between the devices of one process. Here the devices read
// each other's arrays in memory.

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Devices meet in every call and read each other's arrays. All make the same calls in the same order.
class Meeting {
 public:
  // Calls use(arrays) with the arrays by device, which stay valid until all devices have used them.
  template <typename Use>
  void Meet(int device, int devices, const void* mine, const Use& use) {
    std::unique_lock<std::mutex> lock(mutex_);
    arrays_.resize(devices);
    arrays_[device] = mine;
    if (++present_ == devices) {
      present_ = 0;
      reading_ = devices;
      changed_.notify_all();
    }
    changed_.wait(lock, [&] { return reading_ > 0; });
    lock.unlock();
    use(arrays_);
    lock.lock();
    if (--reading_ == 0) changed_.notify_all();
    // reading_ can only rise again once this device comes back, too.
    changed_.wait(lock, [&] { return reading_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<const void*> arrays_;
  int present_ = 0, reading_ = 0;
};

Meeting siblings;

ffi::Error Gather(int64_t devices, ffi::Buffer<ffi::S32, 0> device, ffi::AnyBuffer mine,
                  ffi::Result<ffi::AnyBuffer> all) {
  const size_t bytes = mine.size_bytes();
  char* to = static_cast<char*>(all->untyped_data());
  siblings.Meet(*device.typed_data(), devices, mine.untyped_data(), [&](const auto& arrays) {
    for (int64_t n = 0; n < devices; ++n) std::memcpy(to + n * bytes, arrays[n], bytes);
  });
  return ffi::Error::Success();
}

// Rows [first, first + count) of the sum over devices.
ffi::Error SumRows(int64_t devices, ffi::Buffer<ffi::S32, 0> device, ffi::Buffer<ffi::S32, 0> first,
                   ffi::Buffer<ffi::S32, 0> count, ffi::Buffer<ffi::F32, 2> mine,
                   ffi::ResultBuffer<ffi::F32, 2> sum) {
  const int64_t width = mine.dimensions()[1], from = *first.typed_data() * width;
  const int64_t values = *count.typed_data() * width;
  float* __restrict to = sum->typed_data();
  siblings.Meet(*device.typed_data(), devices, mine.untyped_data(), [&](const auto& arrays) {
    std::memcpy(to, static_cast<const float*>(arrays[0]) + from, values * sizeof(float));
    for (int64_t n = 1; n < devices; ++n) {
      const float* part = static_cast<const float*>(arrays[n]) + from;
      for (int64_t i = 0; i < values; ++i) to[i] += part[i];
    }
  });
  return ffi::Error::Success();
}

auto GatherBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("devices")
      .Arg<ffi::Buffer<ffi::S32, 0>>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>();
}

auto SumRowsBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("devices")
      .Arg<ffi::Buffer<ffi::S32, 0>>()
      .Arg<ffi::Buffer<ffi::S32, 0>>()
      .Arg<ffi::Buffer<ffi::S32, 0>>()
      .Arg<ffi::Buffer<ffi::F32, 2>>()
      .Ret<ffi::Buffer<ffi::F32, 2>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SiblingsGather, Gather, GatherBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SiblingsSum, SumRows, SumRowsBinding());
