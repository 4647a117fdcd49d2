// Threads that share the work of native calls.

#pragma once

#include <cstdint>
#include <functional>

namespace dance {

// The threads of this process, shared by all callers. The caller of `For` works too and waits only for
// parts that other threads have begun, so nothing hangs if all threads are busy. Idle threads sleep.
class Threads {
 public:
  // The threads of this process, made at first use: one per hardware thread unless Set was called.
  static Threads& Get();
  // Sets how many threads, including the caller, work on a call. Must be called before the first use.
  static void Set(int64_t count);

  virtual ~Threads() = default;
  virtual int64_t count() const = 0;
  // Calls run(i) for all i in [0, count).
  virtual void For(int64_t count, const std::function<void(int64_t)>& run) = 0;
};

}  // namespace dance
