// Products with weights in any format (models/formats.py), and what goes with them, as plain functions.
//
// A product's element is a chain of fused multiply-adds over the inputs in their order, from the value
// that was there; a weight is one float32, value(code) * scale + offset. So the bits of a row's result
// depend on that row alone: not on the rows beside it, on the threads, on how a product is cut, or on
// the processor's instructions.

#pragma once

#include <cstddef>
#include <cstdint>

namespace dance {

// Numbers as kernels_cpu.py has them.
enum class Kind : int32_t { kFloat32, kBfloat16, kFloat16, kInt8, kFp8, kInt4, kMxfp4 };
enum class ScaleKind : int32_t { kNone, kFloat32, kBfloat16, kFloat16, kE8m0 };

// How a matrix's weights are kept; a WeightFormat.
struct Format {
  Kind kind = Kind::kFloat32;
  ScaleKind scale = ScaleKind::kNone;
  // Inputs that share a scale.
  int64_t group = 0;
  bool offset = false;

  // Bytes of `count` outputs of one input's values or codes; of four bits, of eight inputs' codes.
  int64_t CodeBytes(int64_t count) const {
    switch (kind) {
      case Kind::kBfloat16:
      case Kind::kFloat16:
        return 2 * count;
      case Kind::kInt8:
      case Kind::kFp8:
        return count;
      default:
        return 4 * count;
    }
  }
  // Inputs of one row of codes.
  int64_t Step() const { return kind == Kind::kInt4 || kind == Kind::kMxfp4 ? 8 : 1; }
  // Bytes of `count` scales or offsets.
  int64_t ScaleBytes(int64_t count) const {
    switch (scale) {
      case ScaleKind::kNone:
        return 0;
      case ScaleKind::kFloat32:
        return 4 * count;
      case ScaleKind::kE8m0:
        return count;
      default:
        return 2 * count;
    }
  }
};

// A WeightFormat as kernels_cpu.py writes it: kind, scale, group, offset.
constexpr size_t kFormatWords = 4;

inline Format ReadFormat(const int64_t* words) {
  return {static_cast<Kind>(words[0]), static_cast<ScaleKind>(words[1]), words[2], words[3] != 0};
}

// Weights [in, out] and where they lie.
struct Matrix {
  Format format;
  int64_t in = 0, out = 0;
  const char* codes = nullptr;
  const char* scale = nullptr;
  const char* offset = nullptr;

  int64_t CodesBytes() const { return in / format.Step() * format.CodeBytes(out); }
  int64_t Groups() const { return format.group ? (in + format.group - 1) / format.group : 0; }
  int64_t ScalesBytes() const { return Groups() * format.ScaleBytes(out); }
};

// What a gated feed-forward computes between its projections (models/config.py).
struct Activation {
  enum Kind : int32_t { kSilu = 0, kGelu = 1, kClamped = 2 } kind = kSilu;
  float alpha = 0, limit = 0;
};

// The functions for one set of instructions.
struct Kernels {
  // y[r, j] += sum over i of x[r, i] * w[i, j], for the outputs j in [begin, end); begin is a multiple
  // of kLanes. Rows of x and y are so many values apart; y's first is output `begin`.
  void (*multiply)(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, int64_t begin,
                   int64_t end, float* y, int64_t y_stride);
  // gate[i] becomes the activation of gate[i] and up[i].
  void (*activate)(const Activation& activation, float* gate, const float* up, int64_t count);
  // y[i] += a * x[i].
  void (*add)(float a, const float* x, float* y, int64_t count);
};

// Values of one vector, on every processor.
constexpr int64_t kLanes = 16;

// The functions for this processor.
const Kernels& ForThisProcessor();
// All that this processor can run, for tests; null behind the last one. The best is the first.
const Kernels* const* AllKernels();

}  // namespace dance
