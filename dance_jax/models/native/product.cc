// The functions of product.h for one set of instructions, DANCE_ISA: __init__.py compiles this file
// once for each.

#include "product.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vector.h"

namespace dance::DANCE_ISA {
namespace {

// Outputs and inputs that are widened together: 16 KiB of floats, which the first cache holds.
constexpr int64_t kPanel = 64, kChunk = 64;
constexpr int64_t kPanelVectors = kPanel / kLanes;
// Vectors of a row's outputs, and rows and vectors of a tile, whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int kMostVectors = 8, kTileRows = 6, kTileVectors = 4;
#else
constexpr int kMostVectors = 4, kTileRows = 6, kTileVectors = 1;
#endif
// Rows of codes that are asked of the memory ahead of their use.
constexpr int64_t kAhead = 16;

template <Kind kind>
inline constexpr bool kTable = kind == Kind::kInt4 || kind == Kind::kMxfp4;
// Inputs of one row whose weights are read together: (measured) so many that the memory streams.
template <Kind kind>
inline constexpr int64_t kDepth = kTable<kind> ? 64 : kind == Kind::kInt8 || kind == Kind::kFp8 ? 16 : 8;
template <Kind kind>
inline constexpr bool kFloats =
    kind == Kind::kFloat32 || kind == Kind::kBfloat16 || kind == Kind::kFloat16;

// Values of one input's outputs, without scale.
template <Kind kind>
inline Vector Values(const char* from) {
  if constexpr (kind == Kind::kFloat32) return Load(reinterpret_cast<const float*>(from));
  if constexpr (kind == Kind::kBfloat16) return FromBfloat16(from);
  if constexpr (kind == Kind::kFloat16) return FromFloat16(from);
  if constexpr (kind == Kind::kInt8) return FromInt8(from);
  if constexpr (kind == Kind::kFp8) return FromFp8(from);
}

// Words of eight codes of sixteen outputs, and the values of each word's i-th code.
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
  // The permutation reads the lowest four bits alone.
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
  // Twice e2m1: 0, 1, 2, 3, 4, 6, 8, 12.
  const Signed magnitude = code & 7;
  const Signed twice = magnitude + ((magnitude - 4) & (magnitude > 4)) + (2 & (magnitude == 7));
  const Vector value = __builtin_convertvector(twice, Vector) * Same(0.5f);
  return reinterpret_cast<Vector>(reinterpret_cast<Signed>(value) | (code & 8) << 28);
}
#endif

inline Vector Scales(ScaleKind kind, const char* row, int64_t output) {
  switch (kind) {
    case ScaleKind::kFloat32:
      return Load(reinterpret_cast<const float*>(row) + output);
    case ScaleKind::kBfloat16:
      return FromBfloat16(row + 2 * output);
    case ScaleKind::kFloat16:
      return FromFloat16(row + 2 * output);
    case ScaleKind::kE8m0:
      return FromE8m0(row + output);
    default:
      return Same(1.0f);
  }
}

// Calls group(scale[C], offset[C], begin, end) for each group's inputs within [begin, end) and the C
// vectors of outputs from `output` on.
template <int C, typename Group>
inline void ByGroups(const Matrix& w, int64_t begin, int64_t end, int64_t output,
                     const Group& group) {
  Vector scale[C], offset[C];
  for (int64_t from = begin; from < end;) {
    const int64_t number = from / w.format.group;
    const int64_t to = std::min(end, (number + 1) * w.format.group);
    const int64_t row = number * w.format.ScaleBytes(w.out);
    for (int c = 0; c < C; ++c) {
      scale[c] = Scales(w.format.scale, w.scale + row, output + c * kLanes);
      if (w.format.offset) {
        offset[c] = Scales(w.format.scale, w.offset + row, output + c * kLanes);
      }
    }
    group(scale, offset, from, to);
    from = to;
  }
}

// Calls take(i, c, weights) for the inputs i in [begin, end) in their order and the vectors c of
// outputs from `output` on; begin and end are whole rows of codes.
template <Kind kind, int C, typename Take>
inline void ForWeights(const Matrix& w, int64_t begin, int64_t end, int64_t output,
                       const Take& take) {
  const int64_t stride = w.format.CodeBytes(w.out), vector = w.format.CodeBytes(kLanes);
  const char* codes = w.codes + w.format.CodeBytes(output);
  if constexpr (kFloats<kind>) {
    for (int64_t i = begin; i < end; ++i) {
      const char* row = codes + i * stride;
      for (int c = 0; c < C; ++c) {
        __builtin_prefetch(row + kAhead * stride + c * vector);
        take(i, c, Values<kind>(row + c * vector));
      }
    }
  } else {
    auto by_groups = [&](auto with_offset) {
      ByGroups<C>(w, begin, end, output,
                  [&](const Vector* scale, const Vector* offset, int64_t from, int64_t to) {
        auto give = [&](int64_t i, int c, Vector value) {
          value = value * scale[c];
          if constexpr (with_offset) value = value + offset[c];
          take(i, c, value);
        };
        if constexpr (kTable<kind>) {
          for (int64_t i = from; i < to; i += 8) {
            const char* row = codes + i / 8 * stride;
            Codes words[C];
            for (int c = 0; c < C; ++c) {
              words[c] = LoadCodes(row + c * vector);
              __builtin_prefetch(row + kAhead / 4 * stride + c * vector);
            }
            for (int part = 0; part < 8; ++part) {
              for (int c = 0; c < C; ++c) give(i + part, c, CodeValues<kind>(words[c], part));
            }
          }
        } else {
          for (int64_t i = from; i < to; ++i) {
            const char* row = codes + i * stride;
            for (int c = 0; c < C; c += 4) __builtin_prefetch(row + kAhead * stride + c * vector);
            for (int c = 0; c < C; ++c) give(i, c, Values<kind>(row + c * vector));
          }
        }
      });
    };
    w.format.offset ? by_groups(std::true_type{}) : by_groups(std::false_type{});
  }
}

// C vectors of outputs of one row, for the inputs [from, to).
template <Kind kind, int C>
void RowTile(const Matrix& w, const float* x, int64_t from, int64_t to, int64_t output, float* y) {
  Vector sum[C];
  for (int c = 0; c < C; ++c) sum[c] = Load(y + c * kLanes);
  ForWeights<kind, C>(w, from, to, output, [&](int64_t i, int c, Vector weights) {
    sum[c] = Fma(Same(x[i]), weights, sum[c]);
  });
  for (int c = 0; c < C; ++c) Store(y + c * kLanes, sum[c]);
}

template <Kind kind, int C = kMostVectors>
void RowTiles(const Matrix& w, const float* x, int64_t from, int64_t to, int64_t begin, int64_t end,
              float* y) {
  for (; end - begin >= C * kLanes; begin += C * kLanes, y += C * kLanes) {
    RowTile<kind, C>(w, x, from, to, begin, y);
  }
  if constexpr (C > 1) RowTiles<kind, C / 2>(w, x, from, to, begin, end, y);
}

// The outputs [begin, end) of one row, whole vectors: all outputs of some inputs, then the next
// inputs, so that the weights are read in the order in which they lie.
template <Kind kind>
void Row(const Matrix& w, const float* x, int64_t begin, int64_t end, float* y) {
  for (int64_t i = 0; i < w.in; i += kDepth<kind>) {
    RowTiles<kind>(w, x, i, std::min(i + kDepth<kind>, w.in), begin, end, y);
  }
}

// Some rows and outputs of a product with floats: x [rows, depth], w [depth, C vectors].
struct Part {
  const float* x;
  const float* w;
  float* y;
  int64_t depth, x_stride, w_stride, y_stride;
};

template <int R, int C>
void Tile(const Part& p) {
  Vector sum[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sum[r][c] = Load(p.y + r * p.y_stride + c * kLanes);
  }
  for (int64_t i = 0; i < p.depth; ++i) {
    Vector w[C];
    for (int c = 0; c < C; ++c) w[c] = Load(p.w + i * p.w_stride + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vector x = Same(p.x[r * p.x_stride + i]);
      for (int c = 0; c < C; ++c) sum[r][c] = Fma(x, w[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) Store(p.y + r * p.y_stride + c * kLanes, sum[r][c]);
  }
}

template <int C, int R>
void Tiles(Part& p, int64_t& rows) {
  for (; rows >= R; rows -= R, p.x += R * p.x_stride, p.y += R * p.y_stride) Tile<R, C>(p);
}

// All rows of `vectors` vectors of outputs.
void AllRows(const Part& part, int64_t rows, int64_t vectors) {
  int64_t c = 0;
  for (; c + kTileVectors <= vectors; c += kTileVectors) {
    Part p = part;
    p.w += c * kLanes, p.y += c * kLanes;
    int64_t left = rows;
    Tiles<kTileVectors, kTileRows>(p, left);
    Tiles<kTileVectors, kTileRows / 2>(p, left);
    Tiles<kTileVectors, 1>(p, left);
  }
  for (; c < vectors; ++c) {
    Part p = part;
    p.w += c * kLanes, p.y += c * kLanes;
    int64_t left = rows;
    Tiles<1, 8>(p, left);
    Tiles<1, 1>(p, left);
  }
}

// Several rows: weights are widened once for all of them, some inputs and outputs at a time.
template <Kind kind>
void Panels(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, int64_t begin,
            int64_t end, float* y, int64_t y_stride) {
  alignas(64) float wide[kChunk * kPanel];
  for (; begin < end; begin += kPanel, y += kPanel) {
    const int64_t vectors = std::min(kPanel, end - begin) / kLanes;
    for (int64_t i = 0; i < w.in; i += kChunk) {
      const int64_t depth = std::min(kChunk, w.in - i);
      Part part{x + i, wide, y, depth, x_stride, vectors * kLanes, y_stride};
      if constexpr (kind == Kind::kFloat32) {
        part.w = reinterpret_cast<const float*>(w.codes) + i * w.out + begin;
        part.w_stride = w.out;
      } else if (vectors == kPanelVectors) {
        ForWeights<kind, kPanelVectors>(w, i, i + depth, begin, [&](int64_t k, int c, Vector v) {
          Store(wide + (k - i) * kPanel + c * kLanes, v);
        });
      } else {
        for (int64_t v = 0; v < vectors; ++v) {
          ForWeights<kind, 1>(w, i, i + depth, begin + v * kLanes, [&](int64_t k, int, Vector values) {
            Store(wide + (k - i) * part.w_stride + v * kLanes, values);
          });
        }
      }
      AllRows(part, rows, vectors);
    }
  }
}

template <Kind kind>
void Whole(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, int64_t begin,
           int64_t end, float* y, int64_t y_stride) {
  if (rows == 1) return Row<kind>(w, x, begin, end, y);
  Panels<kind>(w, x, rows, x_stride, begin, end, y, y_stride);
}

// A copy of the last outputs of a matrix, fewer than a vector, with nothing behind them.
struct Padded {
  Matrix matrix;
  std::vector<char> content;

  Padded(const Matrix& w, int64_t begin) : matrix(w) {
    matrix.out = kLanes;
    content.resize(matrix.CodesBytes() + 2 * matrix.ScalesBytes());
    char* to = content.data();
    auto copy = [&](const char*& from, int64_t rows, int64_t width, int64_t stride, int64_t skip) {
      for (int64_t i = 0; i < rows; ++i) {
        std::memcpy(to + i * width, from + i * stride + skip, stride - skip);
      }
      from = to;
      to += rows * width;
    };
    const Format& f = w.format;
    copy(matrix.codes, w.in / f.Step(), f.CodeBytes(kLanes), f.CodeBytes(w.out),
         f.CodeBytes(begin));
    const int64_t stride = f.ScaleBytes(w.out), skip = f.ScaleBytes(begin);
    if (f.group) copy(matrix.scale, w.Groups(), f.ScaleBytes(kLanes), stride, skip);
    if (f.offset) copy(matrix.offset, w.Groups(), f.ScaleBytes(kLanes), stride, skip);
  }
};

void Multiply(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, int64_t begin,
              int64_t end, float* y, int64_t y_stride) {
  auto run = [&](const Matrix& w, int64_t begin, int64_t end, float* y, int64_t y_stride) {
    auto whole = [&](auto kind) {
      Whole<decltype(kind)::value>(w, x, rows, x_stride, begin, end, y, y_stride);
    };
    switch (w.format.kind) {
      case Kind::kFloat32:
        return whole(std::integral_constant<Kind, Kind::kFloat32>());
      case Kind::kBfloat16:
        return whole(std::integral_constant<Kind, Kind::kBfloat16>());
      case Kind::kFloat16:
        return whole(std::integral_constant<Kind, Kind::kFloat16>());
      case Kind::kInt8:
        return whole(std::integral_constant<Kind, Kind::kInt8>());
      case Kind::kFp8:
        return whole(std::integral_constant<Kind, Kind::kFp8>());
      case Kind::kInt4:
        return whole(std::integral_constant<Kind, Kind::kInt4>());
      case Kind::kMxfp4:
        return whole(std::integral_constant<Kind, Kind::kMxfp4>());
    }
  };
  const int64_t count = (end - begin) / kLanes * kLanes, left = end - begin - count;
  if (count) run(w, begin, begin + count, y, y_stride);
  if (!left) return;
  const Padded padded(w, begin + count);
  std::vector<float> sums(rows * kLanes, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(&sums[r * kLanes], y + r * y_stride + count, left * sizeof(float));
  }
  run(padded.matrix, 0, kLanes, sums.data(), kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(y + r * y_stride + count, &sums[r * kLanes], left * sizeof(float));
  }
}

// Calls run(first, count) for each vector's part of so many values.
template <typename Run>
void ByVectors(int64_t count, const Run& run) {
  for (int64_t i = 0; i < count; i += kLanes) run(i, std::min(kLanes, count - i));
}

// The activation of vectors.
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

// choose.cc takes it.
extern const Kernels kernels;
const Kernels kernels = {Multiply, Activate, Add};

}  // namespace dance::DANCE_ISA
