// Threads that share the work of native calls.

#pragma once

#include <cstdint>
#include <functional>

namespace dance {

// Of this process, for all its callers. The caller of `For` works too and waits only for what others
// have begun, so nothing hangs where all threads are busy. Threads without work sleep.
class Threads {
 public:
  // Those of this process; made at first use, with as many as the processor has unless Set said.
  static Threads& Get();
  // How many work on a call together, the caller among them; before the first use.
  static void Set(int64_t count);

  virtual ~Threads() = default;
  virtual int64_t count() const = 0;
  // Calls run(i) for all i in [0, count).
  virtual void For(int64_t count, const std::function<void(int64_t)>& run) = 0;
};

}  // namespace dance
