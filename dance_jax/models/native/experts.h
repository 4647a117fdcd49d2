// The grouped feed-forward of gated experts, and the slots that hold a device's experts.

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

// One expert: down(activation(gate(x) + b_gate, up(x) + b_up)) + b_down; biases may be null.
struct Expert {
  Matrix gate, up, down;
  const float *b_gate = nullptr, *b_up = nullptr, *b_down = nullptr;
};

// Rows and the experts that each of them wants.
struct Assignments {
  const float* x;         // [n, d]
  const int32_t* expert;  // [n, k], numbers of experts, -1 for none
  const float* weight;    // [n, k]
  int64_t n, k;
};

// y [n, d] = the sum over k of weight * expert(x), in the order of k. Returns the pairs of a row and an
// expert that there were; a null expert counts for nothing.
int64_t RunExperts(int64_t d, const Activation& activation,
                   const std::vector<const Expert*>& experts, const Assignments& rows, float* y);

// y [n, out] = x [n, in] @ w, on all threads.
void RunProduct(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, float* y,
                int64_t y_stride);

// What a slot of a pool holds; an ExpertFormat. Its arrays in their order: those of gate, up and down
// (values; or codes, scale and perhaps offset), then the biases of the three.
struct ExpertSpec {
  int64_t d, f;
  Activation activation;
  Format gate, up, down;
  bool bias;
};

// The slots of a device. Any thread may write a slot while others compute with what it held: they keep
// that until they are done.
class ExpertPool {
 public:
  // What a slot holds.
  struct Held {
    // Which expert it is: layer * experts of a layer + expert.
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
  // Copies what a slot holds; false: nothing yet.
  bool Get(int64_t slot, void* const* arrays) const;
  // The experts with these ids; null: none of the slots holds it.
  std::vector<Holding> Find(const std::vector<int64_t>& ids) const;
  int64_t bytes() const;
  // As RunExperts; the experts' numbers are slots, and what is in an empty one counts for nothing.
  int64_t Run(const Assignments& rows, float* y) const;

 private:
  // An expert whose parts lie in memory from `at` on, and the bytes that they take.
  std::pair<Expert, int64_t> Lay(char* at) const;

  const ExpertSpec spec_;
  mutable std::mutex mutex_;
  std::vector<Holding> slots_;
  // The slot of each expert that is here.
  std::unordered_map<int64_t, int64_t> slot_of_;
};

}  // namespace dance
