// Attention of a step's tokens over the paged cache on CPU. attention.py defines the mathematics.
//
// A token's result depends on its own positions alone, bit for bit: positions are processed in blocks
// of 16 that begin at multiples of 16, whatever other tokens, rows or threads there are. Prefill and
// decode use the same arithmetic.

#include <vector>

#include "parallel.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dance::DANCE_ISA;

// Heads that read a cache entry together, entries per tile of scores, vectors per tile of values.
constexpr int kQueries = 4, kEntries = 4, kVectors = 4;
// Number of products (a query value times a key value) from which it pays to wake a thread.
constexpr int64_t kWorthAThread = 1 << 17;

// Consecutive tokens of one sequence.
struct Row {
  int64_t token, start, length;
  const int32_t* table;
};

template <typename T>
struct Attention {
  const float* query;  // [t, g, q, k]
  const float* sinks;  // [g, q], or null
  T* cache;            // [blocks, size, width]
  float* out;          // [t, g, q, v]
  int64_t groups, queries, key_width, value_begin, value_width, size, width;
  int64_t window;  // 0: all positions
  float scale;

  T* Entry(const Row& row, int64_t position) const {
    return cache + (row.table[position / size] * size + position % size) * width;
  }
};

// scores[q][j] = scale * query q . key j, for Q queries and the J keys from `first` on.
template <int Q, int J, typename T>
void Scores(const float* query, const T* const* keys, const Attention<T>& a, int first,
            float (*scores)[kLanes]) {
  const int64_t width = a.key_width;
  Vector sum[Q][J] = {};
  auto add = [&](auto load, int64_t at) {
    Vector key[J];
    for (int j = 0; j < J; ++j) key[j] = load(keys[first + j] + at);
    for (int q = 0; q < Q; ++q) {
      const Vector x = load(query + q * width + at);
      for (int j = 0; j < J; ++j) sum[q][j] = Fma(x, key[j], sum[q][j]);
    }
  };
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) add([](auto* from) { return Load(from); }, at);
  if (at < width) add([&](auto* from) { return LoadSome(from, width - at); }, at);
  for (int q = 0; q < Q; ++q) {
    for (int j = 0; j < J; ++j) scores[q][first + j] = Sum(sum[q][j]) * a.scale;
  }
}

// sums[q] = sums[q] * shrink[q] + the weighted values of entries [from, to), for C vectors of outputs.
template <int Q, int C, typename T>
void Values(float* sums, int64_t width, int64_t at, const float* shrink, const T* const* values,
            const float (*weights)[kLanes], int from, int to) {
  Vector sum[Q][C];
  const int64_t rest = width - at;
  for (int q = 0; q < Q; ++q) {
    for (int c = 0; c < C; ++c) {
      sum[q][c] =
          LoadSome(sums + q * width + at + c * kLanes, rest - c * kLanes) * Same(shrink[q]);
    }
  }
  for (int j = from; j < to; ++j) {
    Vector value[C];
    for (int c = 0; c < C; ++c) value[c] = LoadSome(values[j] + at + c * kLanes, rest - c * kLanes);
    for (int q = 0; q < Q; ++q) {
      for (int c = 0; c < C; ++c) sum[q][c] = Fma(Same(weights[q][j]), value[c], sum[q][c]);
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int c = 0; c < C; ++c) {
      StoreSome(sums + q * width + at + c * kLanes, sum[q][c], rest - c * kLanes);
    }
  }
}

// Attention of one token for Q query heads of one key head, from `head` on.
template <int Q, typename T>
void Attend(const Attention<T>& a, const Row& row, int64_t index, int64_t group, int64_t head) {
  const int64_t position = row.start + index;
  const int64_t place = ((row.token + index) * a.groups + group) * a.queries + head;
  const float* query = a.query + place * a.key_width;
  float* sums = a.out + place * a.value_width;
  std::fill(sums, sums + Q * a.value_width, 0.0f);
  float top[Q];
  Vector total[Q] = {};
  std::fill(top, top + Q, -std::numeric_limits<float>::infinity());
  const int64_t first = a.window == 0 ? 0 : std::max<int64_t>(position - a.window + 1, 0);
  for (int64_t begin = first / kLanes * kLanes; begin <= position; begin += kLanes) {
    const int from = std::max<int64_t>(first - begin, 0);
    const int to = std::min<int64_t>(position + 1 - begin, kLanes);
    const T *keys[kLanes], *values[kLanes];
    for (int j = from; j < to; ++j) {
      const T* entry = a.Entry(row, begin + j);
      keys[j] = entry + group * a.key_width;
      values[j] = entry + a.value_begin + group * a.value_width;
    }
    float scores[Q][kLanes], shrink[Q];
    for (int q = 0; q < Q; ++q) {
      std::fill(scores[q], scores[q] + kLanes, -std::numeric_limits<float>::infinity());
    }
    int j = from;
    for (; j + kEntries <= to; j += kEntries) Scores<Q, kEntries>(query, keys, a, j, scores);
    for (; j < to; ++j) Scores<Q, 1>(query, keys, a, j, scores);
    for (int q = 0; q < Q; ++q) {
      const Vector score = Load(scores[q]);
      const float higher = std::max(top[q], Max(score));
      shrink[q] = Exp(top[q] - higher);
      const Vector weights = Exp(score - Same(higher));
      total[q] = Fma(total[q], Same(shrink[q]), weights);
      Store(scores[q], weights);
      top[q] = higher;
    }
    int64_t at = 0;
    for (; at + kVectors * kLanes <= a.value_width; at += kVectors * kLanes) {
      Values<Q, kVectors>(sums, a.value_width, at, shrink, values, scores, from, to);
    }
    for (; at < a.value_width; at += kLanes) {
      Values<Q, 1>(sums, a.value_width, at, shrink, values, scores, from, to);
    }
  }
  for (int q = 0; q < Q; ++q) {
    float sum = Sum(total[q]);
    if (a.sinks != nullptr) sum += Exp(a.sinks[group * a.queries + head + q] - top[q]);
    float* out = sums + q * a.value_width;
    for (int64_t i = 0; i < a.value_width; ++i) out[i] /= sum;
  }
}

// Attention of all tokens of some rows, in parallel over tokens, key heads and query heads.
template <typename T>
void AttendRows(const Attention<T>& a, const std::vector<Row>& rows) {
  constexpr int64_t kTokens = 4;  // per task
  struct Task {
    const Row* row;
    int64_t index, group, head;
  };
  std::vector<Task> tasks;
  int64_t work = 0;
  for (const Row& row : rows) {
    const int64_t seen = row.start + row.length;
    work += row.length * a.groups * a.queries * a.key_width * (a.window ? std::min(a.window, seen) : seen);
    for (int64_t index = 0; index < row.length; index += kTokens) {
      for (int64_t group = 0; group < a.groups; ++group) {
        for (int64_t head = 0; head < a.queries; head += kQueries) {
          tasks.push_back({&row, index, group, head});
        }
      }
    }
  }
  auto run = [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t last = std::min(task.index + kTokens, task.row->length);
    for (int64_t index = task.index; index < last; ++index) {
      if (task.head + kQueries <= a.queries) {
        Attend<kQueries>(a, *task.row, index, task.group, task.head);
        continue;
      }
      for (int64_t head = task.head; head < a.queries; ++head) {
        Attend<1>(a, *task.row, index, task.group, head);
      }
    }
  };
  if (work < kWorthAThread) {
    for (size_t i = 0; i < tasks.size(); ++i) run(i);
  } else {
    dance::Threads::Get().For(tasks.size(), run);
  }
}

// Writes the tokens' entries to the cache, then attends over the cache.
//   cached: [1, blocks, size, width]; `cache` is the same buffer.
//   kinds: pairs of (number of rows, tokens per row). length: tokens of a row without padding.
template <ffi::DataType kType>
ffi::Error WriteAndAttend(ffi::Span<const int64_t> kinds, float scale,
                          int64_t window, int64_t value_begin, ffi::Buffer<ffi::F32, 4> query,
                          ffi::Buffer<kType, 2> fresh, ffi::Buffer<kType, 4> cached,
                          ffi::Buffer<ffi::S32, 1> start, ffi::Buffer<ffi::S32, 1> length,
                          ffi::Buffer<ffi::S32, 2> table, ffi::RemainingArgs sinks,
                          ffi::ResultBuffer<ffi::F32, 4> mixed, ffi::ResultBuffer<kType, 4> cache) {
  using T = std::conditional_t<kType == ffi::F32, float, uint16_t>;
  const auto shape = query.dimensions(), paged = cache->dimensions();
  const float* sink = nullptr;
  if (sinks.size() > 0) {
    const auto buffer = sinks.get<ffi::Buffer<ffi::F32, 2>>(0);
    if (!buffer.has_value()) return ffi::Error::InvalidArgument("sinks: expected float32 [g, q]");
    sink = buffer->typed_data();
  }
  Attention<T> a{query.typed_data(),
                 sink,
                 reinterpret_cast<T*>(cache->untyped_data()),
                 mixed->typed_data(),
                 shape[1],
                 shape[2],
                 shape[3],
                 value_begin,
                 mixed->dimensions()[3],
                 paged[2],
                 paged[3],
                 window,
                 scale};
  const T* fresh_tw = reinterpret_cast<const T*>(fresh.untyped_data());
  std::vector<Row> rows;
  int64_t row = 0, token = 0;
  for (size_t kind = 0; kind < kinds.size(); kind += 2) {
    for (int64_t i = 0; i < kinds[kind]; ++i, ++row, token += kinds[kind + 1]) {
      const int64_t count = length.typed_data()[row];
      rows.push_back({token, start.typed_data()[row], count,
                      table.typed_data() + row * table.dimensions()[1]});
      for (int64_t t = 0; t < count; ++t) {
        std::memcpy(a.Entry(rows.back(), rows.back().start + t), fresh_tw + (token + t) * a.width,
                    a.width * sizeof(T));
      }
      // The output of padding is 0.
      const int64_t floats = a.groups * a.queries * a.value_width;
      std::fill(a.out + (token + count) * floats, a.out + (token + kinds[kind + 1]) * floats, 0.0f);
    }
  }
  AttendRows(a, rows);
  return ffi::Error::Success();
}

template <ffi::DataType kType>
auto WriteAndAttendBinding() {
  return ffi::Ffi::Bind()
      .template Attr<ffi::Span<const int64_t>>("kinds")
      .template Attr<float>("scale")
      .template Attr<int64_t>("window")
      .template Attr<int64_t>("value_begin")
      .template Arg<ffi::Buffer<ffi::F32, 4>>()
      .template Arg<ffi::Buffer<kType, 2>>()
      .template Arg<ffi::Buffer<kType, 4>>()
      .template Arg<ffi::Buffer<ffi::S32, 1>>()
      .template Arg<ffi::Buffer<ffi::S32, 1>>()
      .template Arg<ffi::Buffer<ffi::S32, 2>>()
      .RemainingArgs()
      .template Ret<ffi::Buffer<ffi::F32, 4>>()
      .template Ret<ffi::Buffer<kType, 4>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendFloat32, WriteAndAttend<ffi::F32>,
                              WriteAndAttendBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendBfloat16, WriteAndAttend<ffi::BF16>,
                              WriteAndAttendBinding<ffi::BF16>());
