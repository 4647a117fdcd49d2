// Records expert calls and layers one by one, to draw them.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>

namespace dance {

// A layer of an own step, a call to a peer, or a peer's call. Times are NowNs().
struct TraceEvent {
  enum Kind : int32_t { kLayer, kCall, kServed };
  enum Outcome : int32_t { kAnswered, kRefused, kLost, kLate };

  int64_t begin = 0, end = 0;
  // When the call arrived at the callee, if it was answered. For an own call, estimated as if both
  // directions took the same time.
  int64_t arrived = 0;
  // When experts were computed: for a layer the local ones, for a call those of the callee.
  int64_t compute_begin = 0, compute_end = 0;
  int64_t step = 0;  // of the caller
  int64_t id = 0;    // of the call, unique per caller
  int32_t kind = kLayer, device = 0, layer = 0, peer = 0, rows = 0;
  int32_t calls = 0;  // number of calls that the callee computed together
  int32_t outcome = kAnswered;
  int32_t bytes = 0;  // both ways
};

// Holds up to `most` events until they are taken. Further events are dropped and counted.
class Trace {
 public:
  explicit Trace(size_t most) : most_(most) {}

  void Add(const TraceEvent& event) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (events_.size() < most_) {
      events_.push_back(event);
    } else {
      ++lost_;
    }
  }

  // Takes out the oldest events and returns their number. lost: events dropped since the last Take.
  int64_t Take(TraceEvent* to, int64_t most, int64_t* lost) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t count = std::min<int64_t>(most, events_.size());
    std::copy_n(events_.begin(), count, to);
    events_.erase(events_.begin(), events_.begin() + count);
    *lost = lost_;
    lost_ = 0;
    return count;
  }

 private:
  const size_t most_;
  std::mutex mutex_;
  std::deque<TraceEvent> events_;
  int64_t lost_ = 0;
};

}  // namespace dance
