#include "experts.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace dance {
namespace {

// Maximum rows that read weights together: the rows fit the second-level cache, and widening the
// weights is cheap beside their products.
constexpr int64_t kRows = 96;
// Number of multiplications from which it pays to wake another thread.
constexpr int64_t kWorthAThread = 1 << 16;
constexpr int64_t kAlignment = 64;

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Calls run(i) for i in [0, count), on several threads if `work` multiplications are worth it.
void For(int64_t count, int64_t work, const std::function<void(int64_t)>& run) {
  if (work < kWorthAThread) {
    for (int64_t i = 0; i < count; ++i) run(i);
  } else {
    Threads::Get().For(count, run);
  }
}

// Number of outputs per part if a product is cut into at least `parts` parts of whole panels.
int64_t Width(int64_t out, int64_t parts) {
  const int64_t panels = (out + kPanel - 1) / kPanel;
  return std::max<int64_t>(1, panels / std::max<int64_t>(1, parts)) * kPanel;
}

// Rows of one expert: [begin, begin + rows) of the sorted assignments.
struct Block {
  const Expert* expert;
  int64_t begin, rows;
};

// A range of a block's outputs.
struct Task {
  const Block* block;
  int64_t begin, end;
};

// Cuts the blocks' outputs into tasks, about two per thread if there are few blocks.
std::vector<Task> Cut(const std::vector<Block>& blocks, int64_t out) {
  const int64_t threads = Threads::Get().count(), count = static_cast<int64_t>(blocks.size());
  const int64_t parts = count >= 2 * threads ? 1 : (2 * threads + count - 1) / count;
  const int64_t width = Width(out, threads == 1 ? 1 : parts);
  std::vector<Task> tasks;
  for (const Block& block : blocks) {
    for (int64_t i = 0; i < out; i += width) tasks.push_back({&block, i, std::min(out, i + width)});
  }
  return tasks;
}

// Initialises rows with a bias, or with zeros.
void Begin(float* rows, int64_t count, int64_t stride, const float* bias, int64_t begin,
           int64_t end) {
  for (int64_t r = 0; r < count; ++r) {
    float* row = rows + r * stride;
    if (bias == nullptr) {
      std::fill(row + begin, row + end, 0.0f);
    } else {
      std::memcpy(row + begin, bias + begin, (end - begin) * sizeof(float));
    }
  }
}

}  // namespace

int64_t RunExperts(int64_t d, const Activation& activation,
                   const std::vector<const Expert*>& experts, const Assignments& rows, float* y) {
  const Kernels& kernels = ForThisProcessor();
  const int64_t all = rows.n * rows.k, count = static_cast<int64_t>(experts.size());
  auto present = [&](int64_t a) {
    const int32_t expert = rows.expert[a];
    return expert >= 0 && expert < count && experts[expert] != nullptr;
  };
  // Sort the assignments by expert (a counting sort); leave out those without an expert.
  std::vector<int64_t> end(count + 1, 0);
  for (int64_t a = 0; a < all; ++a) {
    if (present(a)) ++end[rows.expert[a] + 1];
  }
  for (int64_t e = 0; e < count; ++e) end[e + 1] += end[e];
  const int64_t total = end[count];
  std::vector<int64_t> next(end.begin(), end.end() - 1), order(total), place(all, -1);
  for (int64_t a = 0; a < all; ++a) {
    if (!present(a)) continue;
    place[a] = next[rows.expert[a]]++;
    order[place[a]] = a;
  }
  std::vector<Block> blocks;
  for (int64_t e = 0; e < count; ++e) {
    const int64_t own = end[e + 1] - end[e], parts = (own + kRows - 1) / kRows;
    for (int64_t b = 0; b < parts; ++b) {
      const int64_t first = own * b / parts, last = own * (b + 1) / parts;
      blocks.push_back({experts[e], end[e] + first, last - first});
    }
  }
  if (blocks.empty()) {
    std::fill(y, y + rows.n * d, 0.0f);
    return 0;
  }

  const int64_t f = blocks[0].expert->gate.out;
  const std::unique_ptr<float[]> memory(new float[total * (2 * f + d)]);
  float *gate = memory.get(), *up = gate + total * f, *out = up + total * f;

  const std::vector<Task> inner = Cut(blocks, f);
  For(static_cast<int64_t>(inner.size()), 2 * total * d * f, [&](int64_t i) {
    const auto& [block, begin, end] = inner[i];
    const Expert& expert = *block->expert;
    thread_local std::vector<float> gathered;
    const float* x = rows.x + order[block->begin] / rows.k * d;
    if (block->rows > 1) {
      gathered.resize(block->rows * d);
      for (int64_t r = 0; r < block->rows; ++r) {
        std::memcpy(&gathered[r * d], rows.x + order[block->begin + r] / rows.k * d,
                    d * sizeof(float));
      }
      x = gathered.data();
    }
    float *g = gate + block->begin * f, *u = up + block->begin * f;
    Begin(g, block->rows, f, expert.b_gate, begin, end);
    Begin(u, block->rows, f, expert.b_up, begin, end);
    kernels.multiply(expert.gate, x, block->rows, d, begin, end, g + begin, f);
    kernels.multiply(expert.up, x, block->rows, d, begin, end, u + begin, f);
    for (int64_t r = 0; r < block->rows; ++r) {
      kernels.activate(activation, g + r * f + begin, u + r * f + begin, end - begin);
    }
  });

  const std::vector<Task> outer = Cut(blocks, d);
  For(static_cast<int64_t>(outer.size()), total * d * f, [&](int64_t i) {
    const auto& [block, begin, end] = outer[i];
    float* sums = out + block->begin * d;
    Begin(sums, block->rows, d, block->expert->b_down, begin, end);
    kernels.multiply(block->expert->down, gate + block->begin * f, block->rows, f, begin, end,
                     sums + begin, d);
  });

  constexpr int64_t kSome = 16;
  For((rows.n + kSome - 1) / kSome, total * d, [&](int64_t i) {
    for (int64_t n = i * kSome; n < std::min(rows.n, (i + 1) * kSome); ++n) {
      std::fill(y + n * d, y + (n + 1) * d, 0.0f);
      for (int64_t a = n * rows.k; a < (n + 1) * rows.k; ++a) {
        if (place[a] >= 0) kernels.add(rows.weight[a], out + place[a] * d, y + n * d, d);
      }
    }
  });
  return total;
}

void RunProduct(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, float* y,
                int64_t y_stride) {
  const Kernels& kernels = ForThisProcessor();
  const int64_t threads = Threads::Get().count(), work = rows * w.in * w.out;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  // A single row reads each weight once, so its parts are long, to stream from memory.
  const int64_t parts = work < kWorthAThread ? 1 : (rows == 1 ? threads : 4 * threads) / blocks;
  const int64_t width = Width(w.out, parts), columns = (w.out + width - 1) / width;
  For(columns * blocks, work, [&](int64_t i) {
    const int64_t first = rows * (i % blocks) / blocks, last = rows * (i % blocks + 1) / blocks;
    const int64_t begin = i / blocks * width, end = std::min(w.out, begin + width);
    float* part = y + first * y_stride;
    Begin(part, last - first, y_stride, nullptr, begin, end);
    kernels.multiply(w, x + first * x_stride, last - first, x_stride, begin, end, part + begin,
                     y_stride);
  });
}

std::pair<Expert, int64_t> ExpertPool::Lay(char* at) const {
  const char* const begin = at;
  Expert expert;
  auto matrix = [&](Matrix& w, const Format& format, int64_t in, int64_t out) {
    w.format = format, w.in = in, w.out = out, w.panels = at;
    at += Aligned(w.Bytes());
  };
  matrix(expert.gate, spec_.gate, spec_.d, spec_.f);
  matrix(expert.up, spec_.up, spec_.d, spec_.f);
  matrix(expert.down, spec_.down, spec_.f, spec_.d);
  auto bias = [&](const float*& values, int64_t width) {
    values = reinterpret_cast<const float*>(at);
    at += Aligned(width * sizeof(float));
  };
  if (spec_.bias) {
    bias(expert.b_gate, spec_.f);
    bias(expert.b_up, spec_.f);
    bias(expert.b_down, spec_.d);
  }
  return {expert, at - begin};
}

namespace {

// Visits the parts of an expert and their arrays: calls matrix(w, arrays) and bias(values, count,
// array).
template <typename Byte, typename ForMatrix, typename ForBias>
void ForParts(const Expert& expert, Byte* const* arrays, const ForMatrix& matrix,
              const ForBias& bias) {
  for (const Matrix* w : {&expert.gate, &expert.up, &expert.down}) {
    Arrays<Byte> own{*arrays++};
    if (w->format.group) own.scale = *arrays++;
    if (w->format.offset) own.offset = *arrays++;
    matrix(*w, own);
  }
  if (expert.b_gate == nullptr) return;
  bias(expert.b_gate, expert.gate.out, *arrays++);
  bias(expert.b_up, expert.up.out, *arrays++);
  bias(expert.b_down, expert.down.out, *arrays);
}

}  // namespace

void ExpertPool::Put(int64_t slot, int64_t id, const void* const* arrays) {
  auto held = std::make_shared<Held>();
  held->id = id;
  held->memory.reset(new char[Lay(nullptr).second + kAlignment]);
  char* begin = held->memory.get();
  begin += -reinterpret_cast<uintptr_t>(begin) % kAlignment;
  held->expert = Lay(begin).first;
  ForParts(
      held->expert, reinterpret_cast<const char* const*>(arrays),
      [](const Matrix& w, const Arrays<const char>& from) {
        Pack(w, from, const_cast<char*>(w.panels));
      },
      [](const float* values, int64_t count, const char* from) {
        std::memcpy(const_cast<float*>(values), from, count * sizeof(float));
      });
  Holding old = std::move(held);  // freed after the lock is released
  const std::lock_guard<std::mutex> lock(mutex_);
  slots_[slot].swap(old);
  if (const auto found = slot_of_.find(old ? old->id : -1); found != slot_of_.end()) {
    if (found->second == slot) slot_of_.erase(found);
    // Another slot may hold the same expert.
    for (int64_t other = 0; other < slots(); ++other) {
      if (slots_[other] && slots_[other]->id == old->id) slot_of_[old->id] = other;
    }
  }
  slot_of_[id] = slot;
}

std::vector<ExpertPool::Holding> ExpertPool::Find(const std::vector<int64_t>& ids) const {
  std::vector<Holding> found(ids.size());
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto slot = slot_of_.find(ids[i]);
    if (slot != slot_of_.end()) found[i] = slots_[slot->second];
  }
  return found;
}

bool ExpertPool::Get(int64_t slot, void* const* arrays) const {
  Holding held;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    held = slots_[slot];
  }
  if (!held) return false;
  ForParts(
      held->expert, reinterpret_cast<char* const*>(arrays),
      [](const Matrix& w, const Arrays<char>& to) { Unpack(w, to); },
      [](const float* values, int64_t count, char* to) {
        std::memcpy(to, values, count * sizeof(float));
      });
  return true;
}

int64_t ExpertPool::bytes() const {
  const Expert expert = Lay(nullptr).first;
  int64_t each = expert.gate.Bytes() + expert.up.Bytes() + expert.down.Bytes();
  if (spec_.bias) each += (2 * spec_.f + spec_.d) * sizeof(float);
  const std::lock_guard<std::mutex> lock(mutex_);
  return each * std::count_if(slots_.begin(), slots_.end(), [](const auto& held) { return held != nullptr; });
}

int64_t ExpertPool::Run(const Assignments& rows, float* y) const {
  // A pool has many slots, of which a call uses few, so the used slots are renumbered.
  const int64_t all = rows.n * rows.k;
  std::vector<int32_t> wanted(rows.expert, rows.expert + all);
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  std::vector<Holding> held(wanted.size());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i] >= 0 && wanted[i] < slots()) held[i] = slots_[wanted[i]];
    }
  }
  std::vector<const Expert*> experts(wanted.size(), nullptr);
  for (size_t i = 0; i < held.size(); ++i) experts[i] = held[i] ? &held[i]->expert : nullptr;
  std::vector<int32_t> numbers(all);
  for (int64_t a = 0; a < all; ++a) {
    numbers[a] = std::lower_bound(wanted.begin(), wanted.end(), rows.expert[a]) - wanted.begin();
  }
  const Assignments renumbered{rows.x, numbers.data(), rows.weight, rows.n, rows.k};
  return RunExperts(spec_.d, spec_.activation, experts, renumbered, y);
}

}  // namespace dance
