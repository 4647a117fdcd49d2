#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dance {
namespace {

using Clock = std::chrono::steady_clock;
// How long a thread without work polls before it sleeps. Between two calls of a layer, polling is
// cheaper than being woken; polling longer would use up the CPU quota of a small host.
constexpr auto kLook = std::chrono::microseconds(15);

inline void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Polls until `ready`, for at most `kLook`.
template <typename Ready>
bool Look(const Ready& ready) {
  const auto end = Clock::now() + kLook;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      Pause();
    }
  } while (Clock::now() < end);
  return ready();
}

struct Job {
  const std::function<void(int64_t)>* run;
  int64_t count;
  std::atomic<int64_t> next{0}, done{0};

  bool Open() const { return next.load(std::memory_order_relaxed) < count; }
  // Works until no part is left to begin. Returns true to the thread that finishes the last part.
  bool Work() {
    bool last = false;
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      (*run)(i);
      last = done.fetch_add(1, std::memory_order_acq_rel) + 1 == count;
    }
    return last;
  }
  bool Done() const { return done.load(std::memory_order_acquire) == count; }
};

class Pool : public Threads {
 public:
  explicit Pool(int64_t count) : count_(count) {
    for (int64_t i = 1; i < count; ++i) std::thread([this] { Serve(); }).detach();
  }

  int64_t count() const override { return count_; }

  void For(int64_t count, const std::function<void(int64_t)>& run) override {
    if (count_ == 1 || count <= 1) {
      for (int64_t i = 0; i < count; ++i) run(i);
      return;
    }
    auto job = std::make_shared<Job>();
    job->run = &run;
    job->count = count;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(job);
      waiting_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load() > 0) work_.notify_all();
    job->Work();
    Remove(job);
    if (Look([&] { return job->Done(); })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return job->Done(); });
  }

 private:
  [[noreturn]] void Serve() {
    while (true) {
      Look([&] { return waiting_.load(std::memory_order_acquire) > 0; });
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        work_.wait(lock, [&] { return !jobs_.empty(); });
        asleep_.fetch_sub(1);
        job = jobs_.front();
        // Rotate the queue, so that the next thread begins with another job if there is one.
        jobs_.pop_front();
        jobs_.push_back(job);
      }
      const bool last = job->Work();
      Remove(job);
      if (last) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_all();
      }
    }
  }

  // Removes a job from the queue. Called when the job has no part left to begin.
  void Remove(const std::shared_ptr<Job>& job) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find(jobs_.begin(), jobs_.end(), job);
    if (found == jobs_.end()) return;
    jobs_.erase(found);
    waiting_.fetch_sub(1, std::memory_order_release);
  }

  const int64_t count_;
  std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<std::shared_ptr<Job>> jobs_;
  std::atomic<int64_t> waiting_{0}, asleep_{0};
};

std::atomic<int64_t> wanted{0};

}  // namespace

void Threads::Set(int64_t count) { wanted = count; }

Threads& Threads::Get() {
  // Never destroyed: its threads may be at work when the process ends.
  static Pool* const pool = new Pool(
      wanted > 0 ? wanted.load() : std::max<int64_t>(1, std::thread::hardware_concurrency()));
  return *pool;
}

}  // namespace dance
