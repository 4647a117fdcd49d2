// Chooses the best instruction set of this processor among those that product.cc was compiled for.

#include "product.h"

namespace dance {

#define DANCE_KERNELS(isa)                             \
  namespace isa {                                      \
  extern const Kernels kernels __attribute__((weak)); \
  }
#if defined(__x86_64__)
DANCE_KERNELS(avx512)
DANCE_KERNELS(avx2)
#endif
DANCE_KERNELS(portable)

const Kernels* const* AllKernels() {
  static const Kernels* found[4];
  static const int count = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (&avx512::kernels && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found[n++] = &avx512::kernels;
    }
    if (&avx2::kernels && avx2) found[n++] = &avx2::kernels;
#endif
    if (&portable::kernels) found[n++] = &portable::kernels;
    return n;
  }();
  static_cast<void>(count);
  return found;
}

const Kernels& ForThisProcessor() {
  static const Kernels& best = *AllKernels()[0];
  return best;
}

}  // namespace dance

extern "C" {

// For tests: y [rows, out] += x [rows, in] @ w with the n-th best instruction set. Returns false if
// there are fewer sets.
bool ProductBy(int64_t number, const int64_t* format, const char* panels, int64_t in, int64_t out,
               const float* x, int64_t rows, float* y) {
  const dance::Kernels* const* all = dance::AllKernels();
  for (int64_t i = 0; i <= number; ++i) {
    if (all[i] == nullptr) return false;
  }
  dance::Matrix w;
  w.format = dance::ReadFormat(format), w.in = in, w.out = out;
  w.panels = panels;
  all[number]->multiply(w, x, rows, in, 0, out, y, out);
  return true;
}

}  // extern "C"
