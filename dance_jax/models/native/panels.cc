// Converts weights between arrays and the panel layout that products read.

#include <algorithm>
#include <cstring>

#include "product.h"

namespace dance {
namespace {

// Calls move(array, at, panel_at, bytes) for each piece of a matrix: its position in one of the arrays,
// and its position in the panels.
template <typename Move>
void ForPieces(const Matrix& w, const Move& move) {
  const Format& f = w.format;
  const int64_t group = f.group ? f.group : w.in, rows = w.in / f.Step();
  int64_t to = 0;
  for (int64_t begin = 0; begin < w.out; begin += kPanel) {
    const int64_t count = std::min(kPanel, w.out - begin), width = w.Width(begin);
    for (int64_t row = 0, g = 0; row < rows; ++g) {
      for (int array = 1; array <= (f.group != 0) + f.offset; ++array) {
        move(array, f.ScaleBytes(g * w.out + begin), to, f.ScaleBytes(count));
        to += f.ScaleBytes(width);
      }
      for (const int64_t end = std::min(rows, row + group / f.Step()); row < end; ++row) {
        move(0, f.CodeBytes(row * w.out + begin), to, f.CodeBytes(count));
        to += f.CodeBytes(width);
      }
    }
  }
}

}  // namespace

void Pack(const Matrix& shape, const Arrays<const char>& from, char* panels) {
  if (shape.out % kLanes) std::memset(panels, 0, shape.Bytes());
  const char* arrays[] = {from.codes, from.scale, from.offset};
  ForPieces(shape, [&](int array, int64_t at, int64_t to, int64_t bytes) {
    std::memcpy(panels + to, arrays[array] + at, bytes);
  });
}

void Unpack(const Matrix& w, const Arrays<char>& to) {
  char* arrays[] = {to.codes, to.scale, to.offset};
  ForPieces(w, [&](int array, int64_t at, int64_t from, int64_t bytes) {
    std::memcpy(arrays[array] + at, w.panels + from, bytes);
  });
}

}  // namespace dance

extern "C" {

// Number of bytes of a matrix's panels.
int64_t PanelsBytes(const int64_t* format, int64_t in, int64_t out) {
  dance::Matrix w;
  w.format = dance::ReadFormat(format), w.in = in, w.out = out;
  return w.Bytes();
}

void PanelsPack(const int64_t* format, int64_t in, int64_t out, const char* codes, const char* scale,
                const char* offset, char* panels) {
  dance::Matrix w;
  w.format = dance::ReadFormat(format), w.in = in, w.out = out;
  dance::Pack(w, {codes, scale, offset}, panels);
}

}  // extern "C"
