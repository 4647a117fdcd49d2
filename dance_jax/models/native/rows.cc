// Per-token operations on CPU: norms, and the choice of experts.
//
// A token's result is the same bit for bit whatever other tokens and threads there are.

#include <vector>

#include "parallel.h"
#include "vector.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dance::DANCE_ISA;

// Number of values of all rows, or bytes of weights, from which it pays to wake a thread.
constexpr int64_t kWorthAThread = 1 << 16;
// Rows per task.
constexpr int64_t kRows = 16;

// Calls run(row) for all rows.
template <typename Run>
void EachRow(int64_t rows, int64_t width, const Run& run) {
  if (rows * width < kWorthAThread) {
    for (int64_t row = 0; row < rows; ++row) run(row);
    return;
  }
  dance::Threads::Get().For((rows + kRows - 1) / kRows, [&](int64_t i) {
    for (int64_t row = i * kRows; row < std::min(rows, (i + 1) * kRows); ++row) run(row);
  });
}

// x / sqrt(mean(x^2) + eps), rounded to T, then times weight; or unrounded, times 1 + weight.
template <typename T>
void Norm(const T* x, const T* weight, T* y, int64_t width, float eps, bool plus_one) {
  Vector squares = {};
  for (int64_t at = 0; at < width; at += kLanes) {
    const Vector values = LoadSome(x + at, width - at);
    squares = Fma(values, values, squares);
  }
  const float factor = 1.0f / std::sqrt(Sum(squares) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; ++i) {
    const float scaled = ToFloat(x[i]) * factor;
    if (plus_one) {
      Round(scaled * (1.0f + ToFloat(weight[i])), y + i);
    } else {
      T rounded;
      Round(scaled, &rounded);
      Round(ToFloat(rounded) * ToFloat(weight[i]), y + i);
    }
  }
}

template <ffi::DataType kType>
ffi::Error NormRows(float eps, bool plus_one, ffi::Buffer<kType, 2> x,
                    ffi::Buffer<kType, 1> weight, ffi::ResultBuffer<kType, 2> y) {
  using T = std::conditional_t<kType == ffi::F32, float, uint16_t>;
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  const T* from = reinterpret_cast<const T*>(x.untyped_data());
  const T* weights = reinterpret_cast<const T*>(weight.untyped_data());
  T* to = reinterpret_cast<T*>(y->untyped_data());
  EachRow(rows, width, [&](int64_t row) {
    Norm(from + row * width, weights, to + row * width, width, eps, plus_one);
  });
  return ffi::Error::Success();
}

// The parameters of a router (models/config.py, RouterConfig).
struct Rule {
  enum Score : int32_t { kSoftmax = 0, kSigmoid = 1, kLogits = 2 } score;
  int64_t experts, top_k, groups, topk_group, group_best;
  bool normalise;
  float norm_epsilon, scale;
};

// Replaces x by exp(x - max(x)) and returns the sum. Overwrites x up to a whole number of lanes.
float Exponentials(float* x, int64_t count) {
  const int64_t room = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(x + count, x + room, -std::numeric_limits<float>::infinity());
  const float top = *std::max_element(x, x + count);
  Vector sum = {};
  for (int64_t at = 0; at < room; at += kLanes) {
    const Vector values = Exp(Load(x + at) - Same(top));
    sum = sum + values;
    Store(x + at, values);
  }
  return Sum(sum);
}

// Takes the `count` largest values in descending order, the first of equal ones; replaces them by NaN.
template <typename Take>
void Largest(float* values, int64_t size, int64_t count, const Take& take) {
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < size; ++i) {
      if (!std::isnan(values[i]) && (best < 0 || values[i] > values[best])) best = i;
    }
    best = std::max<int64_t>(best, 0);
    take(k, best, values[best]);
    values[best] = std::numeric_limits<float>::quiet_NaN();
  }
}

// Chooses experts and weights [k] of one token from its logits [e]. correction: [e] or null.
void ChooseOne(const Rule& rule, const float* logits, const float* correction, int32_t* expert,
            float* weight) {
  thread_local std::vector<float> scratch;
  const int64_t e = rule.experts, room = e + kLanes;
  scratch.resize(2 * room + rule.groups);
  float *score = scratch.data(), *choice = score + room, *group = choice + room;
  std::copy(logits, logits + e, score);
  if (rule.score == Rule::kSoftmax) {
    const float sum = Exponentials(score, e);
    for (int64_t i = 0; i < e; ++i) score[i] /= sum;
  } else if (rule.score == Rule::kSigmoid) {
    for (int64_t at = 0; at < e; at += kLanes) {
      StoreSome(score + at, Sigmoid(LoadSome(score + at, e - at)), e - at);
    }
  }
  for (int64_t i = 0; i < e; ++i) choice[i] = correction ? score[i] + correction[i] : score[i];
  if (rule.groups > 1) {
    // A group is ranked by the sum of its best choices; experts of other groups are excluded.
    const int64_t size = e / rule.groups;
    std::vector<float> members(size);
    for (int64_t g = 0; g < rule.groups; ++g) {
      std::copy(choice + g * size, choice + (g + 1) * size, members.begin());
      group[g] = 0.0f;
      Largest(members.data(), size, rule.group_best,
              [&](int64_t, int64_t, float value) { group[g] += value; });
    }
    Largest(group, rule.groups, rule.topk_group, [](int64_t, int64_t, float) {});
    for (int64_t g = 0; g < rule.groups; ++g) {
      if (std::isnan(group[g])) continue;  // NaN: the group was taken
      std::fill(choice + g * size, choice + (g + 1) * size, -std::numeric_limits<float>::infinity());
    }
  }
  Largest(choice, e, rule.top_k, [&](int64_t k, int64_t i, float) {
    expert[k] = static_cast<int32_t>(i);
    weight[k] = score[i];
  });
  if (rule.score == Rule::kLogits) {
    std::vector<float> chosen(weight, weight + rule.top_k);
    chosen.resize(rule.top_k + kLanes);
    const float sum = Exponentials(chosen.data(), rule.top_k);
    for (int64_t k = 0; k < rule.top_k; ++k) weight[k] = chosen[k] / sum;
  }
  if (rule.normalise) {
    float sum = 0.0f;
    for (int64_t k = 0; k < rule.top_k; ++k) sum += weight[k];
    for (int64_t k = 0; k < rule.top_k; ++k) weight[k] /= sum + rule.norm_epsilon;
  }
  for (int64_t k = 0; k < rule.top_k; ++k) weight[k] *= rule.scale;
}

ffi::Error ChooseRows(int32_t score, int64_t groups, int64_t topk_group,
                         int64_t group_best, bool normalise, float norm_epsilon, float scale,
                         ffi::Buffer<ffi::F32, 2> logits, ffi::RemainingArgs corrections,
                         ffi::ResultBuffer<ffi::S32, 2> expert,
                         ffi::ResultBuffer<ffi::F32, 2> weight) {
  const int64_t rows = logits.dimensions()[0], k = expert->dimensions()[1];
  const Rule rule{static_cast<Rule::Score>(score), logits.dimensions()[1], k,     groups, topk_group,
                  group_best,                      normalise,              norm_epsilon, scale};
  const float* correction = nullptr;
  if (corrections.size() > 0) {
    const auto buffer = corrections.get<ffi::Buffer<ffi::F32, 1>>(0);
    if (!buffer.has_value()) return ffi::Error::InvalidArgument("correction: expected float32 [e]");
    correction = buffer->typed_data();
  }
  EachRow(rows, rule.experts * k, [&](int64_t row) {
    ChooseOne(rule, logits.typed_data() + row * rule.experts, correction,
           expert->typed_data() + row * k, weight->typed_data() + row * k);
  });
  return ffi::Error::Success();
}

template <ffi::DataType kType>
auto NormBinding() {
  return ffi::Ffi::Bind()
      .template Attr<float>("eps")
      .template Attr<bool>("plus_one")
      .template Arg<ffi::Buffer<kType, 2>>()
      .template Arg<ffi::Buffer<kType, 1>>()
      .template Ret<ffi::Buffer<kType, 2>>();
}

auto ChooseBinding() {
  return ffi::Ffi::Bind()
      .Attr<int32_t>("score")
      .Attr<int64_t>("groups")
      .Attr<int64_t>("topk_group")
      .Attr<int64_t>("group_best")
      .Attr<bool>("normalise")
      .Attr<float>("norm_epsilon")
      .Attr<float>("scale")
      .Arg<ffi::Buffer<ffi::F32, 2>>()
      .RemainingArgs()
      .Ret<ffi::Buffer<ffi::S32, 2>>()
      .Ret<ffi::Buffer<ffi::F32, 2>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(NormFloat32, NormRows<ffi::F32>, NormBinding<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(NormBfloat16, NormRows<ffi::BF16>, NormBinding<ffi::BF16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ChooseExperts, ChooseRows, ChooseBinding());
