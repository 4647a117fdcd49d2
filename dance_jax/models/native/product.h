// Products with weights in any format (models/formats.py), and what goes with them, as plain functions.
//
// A product's element begins with the value that was there. Of weights without scales, it is a chain of
// fused multiply-adds over the inputs in their order. Of codes, such a chain over the values of a
// group's codes begins with 0 and is added times the group's scale, group after group; an offset is
// added times the sum of the group's inputs. So the bits of a row's result depend on that row alone: not
// on the rows beside it, on the threads, on how a product is cut, or on the processor's instructions.

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
  constexpr int64_t CodeBytes(int64_t count) const {
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
  constexpr int64_t Step() const { return kind == Kind::kInt4 || kind == Kind::kMxfp4 ? 8 : 1; }
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
  // Bytes of so many inputs' codes in a panel of `width` outputs, and with their scales and offsets:
  // those of whole groups, or of a matrix's last inputs.
  int64_t CodesBytes(int64_t inputs, int64_t width) const {
    return inputs / Step() * CodeBytes(width);
  }
  int64_t PanelBytes(int64_t inputs, int64_t width) const {
    const int64_t groups = group ? (inputs + group - 1) / group : 0;
    return CodesBytes(inputs, width) + groups * ScaleBytes(width) * (1 + offset);
  }
};

// A WeightFormat as kernels_cpu.py writes it: kind, scale, group, offset.
constexpr size_t kFormatWords = 4;

inline Format ReadFormat(const int64_t* words) {
  return {static_cast<Kind>(words[0]), static_cast<ScaleKind>(words[1]), words[2], words[3] != 0};
}

// Values of one vector, on every processor, and outputs of a panel.
constexpr int64_t kLanes = 16, kPanel = 64;

// Weights [in, out] as products read them, from the first byte to the last: for each panel of outputs,
// for each group of inputs, the outputs' scales, their offsets, and then input after input the
// outputs' codes. The last panel has fewer outputs, filled up with zeros to whole vectors. Values
// without scales are one group.
struct Matrix {
  Format format;
  int64_t in = 0, out = 0;
  const char* panels = nullptr;

  // Outputs of the panel that begins with output `begin`.
  int64_t Width(int64_t begin) const {
    const int64_t left = (out - begin + kLanes - 1) / kLanes * kLanes;
    return left < kPanel ? left : kPanel;
  }
  // Where the panel that begins with output `begin` lies.
  int64_t At(int64_t begin) const { return begin / kPanel * format.PanelBytes(in, kPanel); }
  int64_t Bytes() const {
    const int64_t last = (out - 1) / kPanel * kPanel;
    return At(last) + format.PanelBytes(in, Width(last));
  }
};

// A matrix's arrays, `WeightFormat.arrays`: codes or values [in, out] (of four bits, [in / 8, out]),
// and where the format has them scales and offsets [groups, out].
template <typename Byte>
struct Arrays {
  Byte *codes = nullptr, *scale = nullptr, *offset = nullptr;
};

// Writes the panels of a matrix, and its arrays.
void Pack(const Matrix& shape, const Arrays<const char>& from, char* panels);
void Unpack(const Matrix& w, const Arrays<char>& to);

// What a gated feed-forward computes between its projections (models/config.py).
struct Activation {
  enum Kind : int32_t { kSilu = 0, kGelu = 1, kClamped = 2 } kind = kSilu;
  float alpha = 0, limit = 0;
};

// The functions for one set of instructions.
struct Kernels {
  // y[r, j] += sum over i of x[r, i] * w[i, j], for the outputs j in [begin, end); begin is a multiple
  // of kPanel, and so is end, or it is the last. Rows of x and y are so many values apart; y's first is
  // output `begin`.
  void (*multiply)(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, int64_t begin,
                   int64_t end, float* y, int64_t y_stride);
  // x[i] = what the weight of input i for one output is worth.
  void (*column)(const Matrix& w, int64_t output, float* x);
  // gate[i] becomes the activation of gate[i] and up[i].
  void (*activate)(const Activation& activation, float* gate, const float* up, int64_t count);
  // y[i] += a * x[i].
  void (*add)(float a, const float* x, float* y, int64_t count);
};

// The functions for this processor.
const Kernels& ForThisProcessor();
// All that this processor can run, for tests; null behind the last one. The best is the first.
const Kernels* const* AllKernels();

}  // namespace dance
