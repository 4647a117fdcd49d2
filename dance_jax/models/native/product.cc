// Implements product.h for one instruction set, DANCE_ISA. __init__.py compiles this file once per set.

#include "product.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace dance::DANCE_ISA {
namespace {

constexpr int kVectors = kPanel / kLanes;
// Maximum rows that read a panel's codes together, and vectors of outputs at a time: (measured) as many
// as keep their sums in registers.
constexpr int kMostRows = 6;
template <int R>
inline constexpr int kTogether =
#if defined(__AVX512F__)
    kVectors;
#else
    R > 2 ? 1 : kVectors / R;
#endif
// Inputs per piece when many rows read the same weights, so that the piece stays in a cache.
constexpr int64_t kInputs = 512;
// Prefetch distance in bytes.
constexpr int64_t kAhead = 2048;

template <Kind kind>
inline constexpr bool kTable = kind == Kind::kInt4 || kind == Kind::kMxfp4;
// Codes of these kinds cost more to widen than to multiply. If kManyRows rows or more read them, they
// are widened once, into the cache.
template <Kind kind>
inline constexpr bool kCostly = kTable<kind> || kind == Kind::kFp8;
constexpr int64_t kManyRows = 24;

// The values of one input's outputs, without scale.
template <Kind kind>
inline Vector Values(const char* from) {
  if constexpr (kind == Kind::kFloat32) return Load(reinterpret_cast<const float*>(from));
  if constexpr (kind == Kind::kBfloat16) return FromBfloat16(from);
  if constexpr (kind == Kind::kFloat16) return FromFloat16(from);
  if constexpr (kind == Kind::kInt8) return FromInt8(from);
  if constexpr (kind == Kind::kFp8) return FromFp8(from);
}

// Codes: words of eight codes each, for sixteen outputs. CodeValues: the values of each word's i-th
// code.
alignas(64) constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
#if defined(__AVX512F__)
using Codes = __m512i;
inline Codes LoadCodes(const char* from) { return _mm512_loadu_si512(from); }
template <Kind kind>
inline Vector CodeValues(Codes words, int i) {
  const Vector table = kind == Kind::kInt4
                           ? _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
                           : _mm512_load_ps(kE2m1);
  // The permutation uses only the lowest four bits of each index.
  return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * i), table);
}
#elif defined(__AVX2__)
struct Codes {
  __m256i low, high;
};
inline Codes LoadCodes(const char* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32))};
}
template <Kind kind>
inline __m256 HalfValues(__m256i words, int i) {
  const __m256i code = _mm256_srli_epi32(words, 4 * i);
  if constexpr (kind == Kind::kInt4) {
    const __m256i low = _mm256_and_si256(code, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(low, _mm256_set1_epi32(8)));
  }
  const __m256i sign = _mm256_slli_epi32(_mm256_srli_epi32(code, 3), 31);
  const __m256 magnitude = _mm256_permutevar8x32_ps(_mm256_load_ps(kE2m1), code);
  return _mm256_xor_ps(magnitude, _mm256_castsi256_ps(sign));
}
template <Kind kind>
inline Vector CodeValues(Codes words, int i) {
  return {HalfValues<kind>(words.low, i), HalfValues<kind>(words.high, i)};
}
#else
using Codes = Words;
inline Codes LoadCodes(const char* from) {
  Codes words;
  std::memcpy(&words, from, sizeof(words));
  return words;
}
template <Kind kind>
inline Vector CodeValues(Codes words, int i) {
  const Signed code = reinterpret_cast<Signed>((words >> (4 * i)) & 15u);
  if constexpr (kind == Kind::kInt4) return __builtin_convertvector(code - 8, Vector);
  // Twice the e2m1 value: 0, 1, 2, 3, 4, 6, 8, 12.
  const Signed magnitude = code & 7;
  const Signed twice = magnitude + ((magnitude - 4) & (magnitude > 4)) + (2 & (magnitude == 7));
  const Vector value = __builtin_convertvector(twice, Vector) * Same(0.5f);
  return reinterpret_cast<Vector>(reinterpret_cast<Signed>(value) | (code & 8) << 28);
}
#endif

// One vector of scales or offsets.
inline Vector Scales(ScaleKind kind, const char* row, int64_t output) {
  switch (kind) {
    case ScaleKind::kFloat32:
      return Load(reinterpret_cast<const float*>(row) + output);
    case ScaleKind::kBfloat16:
      return FromBfloat16(row + 2 * output);
    case ScaleKind::kFloat16:
      return FromFloat16(row + 2 * output);
    default:
      return FromE8m0(row + output);
  }
}

// Calls take(i, c, value) for `count` inputs in order, for C vectors of outputs of a panel that is
// `width` outputs wide. `codes` points to the codes of the first vector.
template <Kind kind, int C, typename Take>
inline void ForValues(const char* codes, int64_t width, int64_t count, const Take& take) {
  constexpr Format format{kind};
  constexpr int64_t step = format.Step(), vector = format.CodeBytes(kLanes);
  const int64_t row = format.CodeBytes(width);
  for (int64_t i = 0; i < count; i += step, codes += row) {
    for (int64_t at = 0; at < C * vector; at += 64) __builtin_prefetch(codes + at + kAhead);
    if constexpr (kTable<kind>) {
      Codes words[C];
      for (int c = 0; c < C; ++c) words[c] = LoadCodes(codes + c * vector);
      for (int part = 0; part < step; ++part) {
        for (int c = 0; c < C; ++c) take(i + part, c, CodeValues<kind>(words[c], part));
      }
    } else {
      for (int c = 0; c < C; ++c) take(i, c, Values<kind>(codes + c * vector));
    }
  }
}

// The sum of a row's values, which is multiplied by the offset of a group.
inline float SumOf(const float* x, int64_t count) {
  Vector sum = Zero();
  for (int64_t i = 0; i < count; i += kLanes) sum = sum + LoadSome(x + i, count - i);
  return Sum(sum);
}

// Whole groups of inputs of one panel, and the rows that they are multiplied with: x [rows, inputs],
// y [rows, width].
struct Piece {
  Format format;
  const char* panel;
  int64_t width, inputs;
  const float* x;
  float* y;
  int64_t x_stride, y_stride;
};

// Multiplies R rows with C vectors of outputs, from vector `first` on.
template <Kind kind, int R, int C>
void Tile(const Piece& p, int first) {
  const Format& f = p.format;
  const int64_t skip = first * kLanes;
  Vector sum[R][C];
  auto multiply = [&](const char* codes, int64_t begin, int64_t count) {
    ForValues<kind, C>(codes + f.CodeBytes(skip), p.width, count, [&](int64_t i, int c, Vector value) {
      for (int r = 0; r < R; ++r) {
        sum[r][c] = Fma(Same(p.x[r * p.x_stride + begin + i]), value, sum[r][c]);
      }
    });
  };
  auto all = [&](const auto& run) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) run(sum[r][c], p.y + r * p.y_stride + skip + c * kLanes, r, c);
    }
  };
  if (f.group == 0) {
    all([](Vector& sum, float* y, int, int) { sum = Load(y); });
    multiply(p.panel, 0, p.inputs);
    all([](Vector& sum, float* y, int, int) { Store(y, sum); });
  } else {
    const int64_t width = f.ScaleBytes(p.width);
    const char* at = p.panel;
    for (int64_t begin = 0; begin < p.inputs; begin += f.group) {
      const int64_t count = std::min(f.group, p.inputs - begin);
      const char *scale = at, *offset = at + width;
      at += f.offset ? 2 * width : width;
      all([](Vector& sum, float*, int, int) { sum = Zero(); });
      multiply(at, begin, count);
      at += f.CodesBytes(count, p.width);
      all([&](Vector& sum, float* y, int, int c) {
        Store(y, Fma(sum, Scales(f.scale, scale, skip + c * kLanes), Load(y)));
      });
      if (!f.offset) continue;
      Vector total[R];
      for (int r = 0; r < R; ++r) total[r] = Same(SumOf(p.x + r * p.x_stride + begin, count));
      all([&](Vector&, float* y, int r, int c) {
        Store(y, Fma(total[r], Scales(f.scale, offset, skip + c * kLanes), Load(y)));
      });
    }
  }
}

// Multiplies all rows of a piece, in tiles of at most R rows.
template <Kind kind, int R = kMostRows>
void Tiles(Piece p, int64_t rows) {
  for (; rows >= R; rows -= R, p.x += R * p.x_stride, p.y += R * p.y_stride) {
    int first = 0;
    const int vectors = p.width / kLanes;
    for (; first + kTogether<R> <= vectors; first += kTogether<R>) Tile<kind, R, kTogether<R>>(p, first);
    for (; first < vectors; ++first) Tile<kind, R, 1>(p, first);
  }
  if constexpr (R > 1) Tiles<kind, R == 6 ? 4 : R / 2>(p, rows);
}

// Widens the codes of a piece to floats in `memory`; copies scales and offsets unchanged.
template <Kind kind>
Piece Widened(const Piece& p, float* memory) {
  Piece wide = p;
  wide.format.kind = Kind::kFloat32;
  wide.panel = reinterpret_cast<const char*>(memory);
  const Format& f = p.format;
  const int64_t group = f.group ? f.group : p.inputs;
  const int64_t before = f.ScaleBytes(p.width) * (1 + f.offset);
  const char* from = p.panel;
  char* to = reinterpret_cast<char*>(memory);
  for (int64_t begin = 0; begin < p.inputs; begin += group) {
    const int64_t count = std::min(group, p.inputs - begin);
    std::memcpy(to, from, before);
    from += before, to += before;
    for (int64_t output = 0; output < p.width; output += kLanes) {
      float* values = reinterpret_cast<float*>(to) + output;
      ForValues<kind, 1>(from + f.CodeBytes(output), p.width, count, [&](int64_t i, int, Vector value) {
        Store(values + i * p.width, value);
      });
    }
    from += f.CodesBytes(count, p.width), to += wide.format.CodesBytes(count, p.width);
  }
  return wide;
}

// Multiplies all rows with the panel that begins with output `begin`; y [rows, panel width].
template <Kind kind>
void Panel(const Matrix& w, int64_t begin, const float* x, int64_t rows, int64_t x_stride, float* y,
           int64_t y_stride) {
  const int64_t group = w.format.group ? w.format.group : 1;
  const int64_t some = rows > kMostRows ? std::max(group, kInputs / group * group) : w.in;
  const bool widen = kCostly<kind> && rows >= kManyRows && some <= kInputs;
  // A scale takes at most the bytes of a float, and a group has at most two.
  alignas(64) thread_local float memory[kCostly<kind> ? 3 * kInputs * kPanel : 1];
  Piece p{w.format, w.panels + w.At(begin), w.Width(begin), 0, x, y, x_stride, y_stride};
  for (int64_t i = 0; i < w.in; i += some) {
    p.inputs = std::min(some, w.in - i), p.x = x + i;
    if (widen) {
      Tiles<Kind::kFloat32>(Widened<kind>(p, memory), rows);
    } else {
      Tiles<kind>(p, rows);
    }
    p.panel += w.format.PanelBytes(p.inputs, p.width);
  }
}

template <Kind kind>
void Panels(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, int64_t begin,
            int64_t end, float* y, int64_t y_stride) {
  for (; begin < end; begin += kPanel, y += kPanel) {
    const int64_t width = w.Width(begin), own = std::min(end - begin, kPanel);
    if (own == width) {
      Panel<kind>(w, begin, x, rows, x_stride, y, y_stride);
      continue;
    }
    // The last vector is not full.
    std::vector<float> sums(rows * width, 0.0f);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(y + r * y_stride, own, &sums[r * width]);
    Panel<kind>(w, begin, x, rows, x_stride, sums.data(), width);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(&sums[r * width], own, y + r * y_stride);
  }
}

// Calls run(integral_constant<Kind, kind>) for a matrix's kind.
template <typename Run>
void ByKind(Kind kind, const Run& run) {
  switch (kind) {
    case Kind::kFloat32:
      return run(std::integral_constant<Kind, Kind::kFloat32>());
    case Kind::kBfloat16:
      return run(std::integral_constant<Kind, Kind::kBfloat16>());
    case Kind::kFloat16:
      return run(std::integral_constant<Kind, Kind::kFloat16>());
    case Kind::kInt8:
      return run(std::integral_constant<Kind, Kind::kInt8>());
    case Kind::kFp8:
      return run(std::integral_constant<Kind, Kind::kFp8>());
    case Kind::kInt4:
      return run(std::integral_constant<Kind, Kind::kInt4>());
    case Kind::kMxfp4:
      return run(std::integral_constant<Kind, Kind::kMxfp4>());
  }
}

void Multiply(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, int64_t begin,
              int64_t end, float* y, int64_t y_stride) {
  ByKind(w.format.kind, [&](auto kind) {
    Panels<decltype(kind)::value>(w, x, rows, x_stride, begin, end, y, y_stride);
  });
}

void Column(const Matrix& w, int64_t output, float* x) {
  const Format& f = w.format;
  const int64_t begin = output / kPanel * kPanel, width = w.Width(begin);
  const int64_t lane = output % kLanes, vector = output - begin - lane;
  const int64_t group = f.group ? f.group : w.in, scales = f.ScaleBytes(width);
  const char* at = w.panels + w.At(begin);
  for (int64_t first = 0; first < w.in; first += group) {
    const int64_t count = std::min(group, w.in - first);
    Vector scale = Same(1.0f), offset = Zero();
    if (f.group) scale = Scales(f.scale, at, vector), at += scales;
    if (f.offset) offset = Scales(f.scale, at, vector), at += scales;
    ByKind(f.kind, [&](auto kind) {
      const char* codes = at + f.CodeBytes(vector);
      ForValues<decltype(kind)::value, 1>(codes, width, count, [&](int64_t i, int, Vector value) {
        if (f.group) value = value * scale;
        if (f.offset) value = value + offset;
        float lanes[kLanes];
        Store(lanes, value);
        x[first + i] = lanes[lane];
      });
    });
    at += f.CodesBytes(count, width);
  }
}

// Calls run(first, count) for each vector of `count` values.
template <typename Run>
void ByVectors(int64_t count, const Run& run) {
  for (int64_t i = 0; i < count; i += kLanes) run(i, std::min(kLanes, count - i));
}

// The activation of one vector.
inline Vector Activated(const Activation& activation, Vector gate, Vector up) {
  switch (activation.kind) {
    case Activation::kSilu:
      return gate * Sigmoid(gate) * up;
    case Activation::kGelu: {
      // (1 + tanh z) / 2 is the sigmoid of 2 z.
      const Vector cube = gate * gate * gate;
      const Vector z = Same(0.7978845608028654f) * Fma(Same(0.044715f), cube, gate);
      return gate * Sigmoid(z + z) * up;
    }
    default: {
      float g[kLanes], u[kLanes];
      Store(g, gate), Store(u, up);
      for (int64_t i = 0; i < kLanes; ++i) {
        g[i] = std::min(g[i], activation.limit);
        u[i] = std::clamp(u[i], -activation.limit, activation.limit);
      }
      const Vector bounded = Load(g);
      return bounded * Sigmoid(Same(activation.alpha) * bounded) * (Load(u) + Same(1.0f));
    }
  }
}

void Activate(const Activation& activation, float* gate, const float* up, int64_t count) {
  ByVectors(count, [&](int64_t i, int64_t some) {
    StoreSome(gate + i, Activated(activation, LoadSome(gate + i, some), LoadSome(up + i, some)),
              some);
  });
}

void Add(float a, const float* x, float* y, int64_t count) {
  ByVectors(count, [&](int64_t i, int64_t some) {
    StoreSome(y + i, Fma(Same(a), LoadSome(x + i, some), LoadSome(y + i, some)), some);
  });
}

}  // namespace

// Referenced by instruction_set.cc.
extern const Kernels kernels;
const Kernels kernels = {Multiply, Column, Activate, Add};

}  // namespace dance::DANCE_ISA
