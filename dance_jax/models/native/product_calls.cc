// The native products as XLA custom calls, and C functions for Python. __init__.py loads and registers
// them.

#include <algorithm>
#include <cstring>
#include <vector>

#include "experts.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace dance {
namespace {

using Rows = ffi::Buffer<ffi::F32, 2>;
using Numbers = ffi::Buffer<ffi::S32, 1>;
using Formats = ffi::Span<const int64_t>;
// Panels of a matrix, or of one matrix per head.
using Panels = ffi::Buffer<ffi::U8>;

Matrix MakeMatrix(const Format& format, int64_t in, int64_t out, const uint8_t* panels) {
  Matrix matrix;
  matrix.format = format, matrix.in = in, matrix.out = out;
  matrix.panels = reinterpret_cast<const char*>(panels);
  return matrix;
}

ffi::Error OtherBytes() {
  return ffi::Error::InvalidArgument("the size of a matrix does not match its format");
}

// y = x @ w; or for each head h, y[:, h] = x[:, h] @ w[h], where x is [n, h, in].
ffi::Error LinearCall(Formats words, ffi::Buffer<ffi::F32> x, Panels panels,
                      ffi::ResultBuffer<ffi::F32> y) {
  const auto from = x.dimensions(), to = y->dimensions();
  const int64_t n = from[0], heads = from.size() == 3 ? from[1] : 1;
  const int64_t in = from.back(), out = to.back();
  const Matrix w = MakeMatrix(ReadFormat(words.begin()), in, out, panels.typed_data());
  if (static_cast<int64_t>(panels.element_count()) != heads * w.Bytes()) return OtherBytes();
  if (heads == 1) {
    RunProduct(w, x.typed_data(), n, in, y->typed_data(), out);
    return ffi::Error::Success();
  }
  const Kernels& kernels = ForThisProcessor();
  auto head = [&](int64_t h) {
    Matrix own = w;
    own.panels += h * w.Bytes();
    float* sums = y->typed_data() + h * out;
    for (int64_t r = 0; r < n; ++r) std::fill(sums + r * heads * out, sums + r * heads * out + out, 0.0f);
    kernels.multiply(own, x.typed_data() + h * in, n, heads * in, 0, out, sums, heads * out);
  };
  if (n * heads * in * out < (1 << 16)) {
    for (int64_t h = 0; h < heads; ++h) head(h);
  } else {
    Threads::Get().For(heads, head);
  }
  return ffi::Error::Success();
}

// y [t, in] = the weights of the outputs `chosen`; numbers out of range are clamped.
ffi::Error ColumnsCall(Formats words, int64_t outputs, Numbers chosen, Panels panels,
                       ffi::Result<Rows> y) {
  const int64_t count = chosen.dimensions()[0], in = y->dimensions()[1];
  const Matrix w = MakeMatrix(ReadFormat(words.begin()), in, outputs, panels.typed_data());
  if (static_cast<int64_t>(panels.element_count()) != w.Bytes()) return OtherBytes();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t output = std::clamp<int64_t>(chosen.typed_data()[t], 0, outputs - 1);
    ForThisProcessor().column(w, output, y->typed_data() + t * in);
  }
  return ffi::Error::Success();
}

// y = down(activation(gate(x), up(x))): all rows through one feed-forward.
ffi::Error GatedMlpCall(Formats words, int32_t activation, float alpha, float limit,
                        int64_t width, Rows x, Panels gate, Panels up, Panels down,
                        ffi::Result<Rows> y) {
  const int64_t n = x.dimensions()[0], d = x.dimensions()[1];
  auto matrix = [&](int part, int64_t in, int64_t out, const Panels& panels) {
    const Format format = ReadFormat(words.begin() + part * kFormatWords);
    return MakeMatrix(format, in, out, panels.typed_data());
  };
  Expert expert;
  expert.gate = matrix(0, d, width, gate);
  expert.up = matrix(1, d, width, up);
  expert.down = matrix(2, width, d, down);
  auto whole = [](const Matrix& w, const Panels& panels) {
    return w.Bytes() == static_cast<int64_t>(panels.element_count());
  };
  if (!whole(expert.gate, gate) || !whole(expert.up, up) || !whole(expert.down, down)) {
    return OtherBytes();
  }
  const std::vector<int32_t> first(n, 0);
  const std::vector<float> ones(n, 1.0f);
  RunExperts(d, {static_cast<Activation::Kind>(activation), alpha, limit}, {&expert},
             {x.typed_data(), first.data(), ones.data(), n, 1}, y->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dance

using dance::Formats;
using dance::Numbers;
using dance::Panels;
using dance::Rows;

XLA_FFI_DEFINE_HANDLER_SYMBOL(Linear, dance::LinearCall,
                              ffi::Ffi::Bind()
                                  .Attr<Formats>("formats")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<Panels>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Columns, dance::ColumnsCall,
                              ffi::Ffi::Bind()
                                  .Attr<Formats>("formats")
                                  .Attr<int64_t>("outputs")
                                  .Arg<Numbers>()
                                  .Arg<Panels>()
                                  .Ret<Rows>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(GatedMlp, dance::GatedMlpCall,
                              ffi::Ffi::Bind()
                                  .Attr<Formats>("formats")
                                  .Attr<int32_t>("activation")
                                  .Attr<float>("alpha")
                                  .Attr<float>("limit")
                                  .Attr<int64_t>("width")
                                  .Arg<Rows>()
                                  .Arg<Panels>()
                                  .Arg<Panels>()
                                  .Arg<Panels>()
                                  .Ret<Rows>());
extern "C" {

// Sets how many threads share a call. Must be called before the first call.
void ThreadsSet(int64_t count) { dance::Threads::Set(count); }

}  // extern "C"
