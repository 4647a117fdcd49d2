// The grouped feed-forward of gated experts, and the pool of slots that holds a device's experts.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "product.h"

namespace dance {

// One expert: down(activation(gate(x) + b_gate, up(x) + b_up)) + b_down. The biases may be null.
struct Expert {
  Matrix gate, up, down;
  const float *b_gate = nullptr, *b_up = nullptr, *b_down = nullptr;
};

// Rows and the experts that each row is routed to.
struct Assignments {
  const float* x;         // [n, d]
  const int32_t* expert;  // [n, k], expert numbers, -1 for none
  const float* weight;    // [n, k]
  int64_t n, k;
};

// y [n, d] = the sum over k of weight * expert(x), in the order of k. Null experts are skipped. Returns
// the number of computed (row, expert) pairs.
int64_t RunExperts(int64_t d, const Activation& activation,
                   const std::vector<const Expert*>& experts, const Assignments& rows, float* y);

// y [n, out] = x [n, in] @ w, on all threads.
void RunProduct(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, float* y,
                int64_t y_stride);

// What a slot of a pool holds; an ExpertFormat. Order of the arrays: those of gate, up and down
// (values; or codes, scale and, if the format has it, offset), then the three biases.
struct ExpertSpec {
  int64_t d, f;
  Activation activation;
  Format gate, up, down;
  bool bias;
};

// The slots of a device. Thread-safe: a thread may write a slot while others compute with the slot's
// previous content, which lives until they are done.
class ExpertPool {
 public:
  // What a slot holds.
  struct Held {
    // Which expert the slot holds: layer * experts per layer + expert.
    int64_t id;
    std::unique_ptr<char[]> memory;
    Expert expert;
  };
  using Holding = std::shared_ptr<const Held>;

  ExpertPool(const ExpertSpec& spec, int64_t slots) : spec_(spec), slots_(slots) {}

  const ExpertSpec& spec() const { return spec_; }
  int64_t slots() const { return static_cast<int64_t>(slots_.size()); }
  // Copies an expert's arrays into a slot.
  void Put(int64_t slot, int64_t id, const void* const* arrays);
  // Copies a slot's arrays out. Returns false if the slot is empty.
  bool Get(int64_t slot, void* const* arrays) const;
  // The experts with these ids. Null for an id that no slot holds.
  std::vector<Holding> Find(const std::vector<int64_t>& ids) const;
  int64_t bytes() const;
  // Like RunExperts, where expert numbers are slots. Empty slots are skipped.
  int64_t Run(const Assignments& rows, float* y) const;

 private:
  // An expert whose parts are laid out in memory from `at` on, and the bytes that the parts take.
  std::pair<Expert, int64_t> Lay(char* at) const;

  const ExpertSpec spec_;
  mutable std::mutex mutex_;
  std::vector<Holding> slots_;
  // The slot of each expert in the pool.
  std::unordered_map<int64_t, int64_t> slot_of_;
};

}  // namespace dance
