// Products with weights in any format (models/formats.py), and related functions, as plain functions.
//
// A product adds to the value that each element of y already has. For weights without scales, an
// element is a chain of fused multiply-adds over the inputs in order. For codes, each group of inputs
// has such a chain over the codes' values, which begins with 0; the chain's result times the group's
// scale is added to the element, group after group. An offset is added times the sum of the group's
// inputs. So the bits of a row's result depend on that row alone: not on the other rows, the threads,
// how a product is cut, or the processor's instructions.

#pragma once

#include <cstddef>
#include <cstdint>

namespace dance {

// The numbers are those of kernels_cpu.py.
enum class Kind : int32_t { kFloat32, kBfloat16, kFloat16, kInt8, kFp8, kInt4, kMxfp4 };
enum class ScaleKind : int32_t { kNone, kFloat32, kBfloat16, kFloat16, kE8m0 };

// How a matrix's weights are stored; a WeightFormat.
struct Format {
  Kind kind = Kind::kFloat32;
  ScaleKind scale = ScaleKind::kNone;
  // Inputs that share a scale.
  int64_t group = 0;
  bool offset = false;

  // Bytes of `count` outputs of one input's values or codes; with four bits, of eight inputs' codes.
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
  // Number of inputs in one row of codes.
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
  // Bytes that `inputs` inputs take in a panel of `width` outputs: their codes, and (PanelBytes) their
  // codes with scales and offsets. The inputs are whole groups or the last ones of a matrix.
  int64_t CodesBytes(int64_t inputs, int64_t width) const {
    return inputs / Step() * CodeBytes(width);
  }
  int64_t PanelBytes(int64_t inputs, int64_t width) const {
    const int64_t groups = group ? (inputs + group - 1) / group : 0;
    return CodesBytes(inputs, width) + groups * ScaleBytes(width) * (1 + offset);
  }
};

// Words of a WeightFormat as kernels_cpu.py passes it: kind, scale, group, offset.
constexpr size_t kFormatWords = 4;

inline Format ReadFormat(const int64_t* words) {
  return {static_cast<Kind>(words[0]), static_cast<ScaleKind>(words[1]), words[2], words[3] != 0};
}

// Values per vector, on every processor; outputs per panel.
constexpr int64_t kLanes = 16, kPanel = 64;

// Weights [in, out] in the order in which products read them: for each panel of outputs, for each group
// of inputs, the outputs' scales, then their offsets, then for each input the outputs' codes. The last
// panel may have fewer outputs, padded with zeros to whole vectors. Values without scales form one
// group.
struct Matrix {
  Format format;
  int64_t in = 0, out = 0;
  const char* panels = nullptr;

  // Number of outputs of the panel that begins with output `begin`.
  int64_t Width(int64_t begin) const {
    const int64_t left = (out - begin + kLanes - 1) / kLanes * kLanes;
    return left < kPanel ? left : kPanel;
  }
  // Byte position of the panel that begins with output `begin`.
  int64_t At(int64_t begin) const { return begin / kPanel * format.PanelBytes(in, kPanel); }
  int64_t Bytes() const {
    const int64_t last = (out - 1) / kPanel * kPanel;
    return At(last) + format.PanelBytes(in, Width(last));
  }
};

// The arrays of a matrix, as in `WeightFormat.arrays`: codes or values [in, out] (with four bits,
// [in / 8, out]), and scales and offsets [groups, out] if the format has them.
template <typename Byte>
struct Arrays {
  Byte *codes = nullptr, *scale = nullptr, *offset = nullptr;
};

// Pack converts a matrix's arrays to panels, Unpack converts back.
void Pack(const Matrix& shape, const Arrays<const char>& from, char* panels);
void Unpack(const Matrix& w, const Arrays<char>& to);

// The activation of a gated feed-forward (models/config.py).
struct Activation {
  enum Kind : int32_t { kSilu = 0, kGelu = 1, kClamped = 2 } kind = kSilu;
  float alpha = 0, limit = 0;
};

// The functions for one instruction set.
struct Kernels {
  // y[r, j] += sum over i of x[r, i] * w[i, j], for the outputs j in [begin, end). begin is a
  // multiple of kPanel; end is a multiple of kPanel or the number of outputs. x_stride and y_stride
  // are the distances between rows in values; y begins with output `begin`.
  void (*multiply)(const Matrix& w, const float* x, int64_t rows, int64_t x_stride, int64_t begin,
                   int64_t end, float* y, int64_t y_stride);
  // x[i] = the weight of input i for one output.
  void (*column)(const Matrix& w, int64_t output, float* x);
  // gate[i] = the activation of gate[i] and up[i].
  void (*activate)(const Activation& activation, float* gate, const float* up, int64_t count);
  // y[i] += a * x[i].
  void (*add)(float a, const float* x, float* y, int64_t count);
};

// The functions for the best instruction set of this processor.
const Kernels& ForThisProcessor();
// All functions that this processor can run, best first, null-terminated; for tests.
const Kernels* const* AllKernels();

}  // namespace dance
