// Sixteen floats at a time, in a fixed order.
//
// A result's bits must not depend on what else is computed with it, so sums have a fixed shape: lane
// l takes the values l, l + 16, ... in their order, and the lanes are added as a tree. Products that
// are added are fused in every build.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace lanes {

constexpr int kLanes = 16;
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Words = int32_t __attribute__((vector_size(4 * kLanes)));

inline float ToFloat(float value) { return value; }
inline float ToFloat(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void Store(float value, float* to) { *to = value; }
// To the nearest bfloat16, ties to the even one.
inline void Store(float value, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  *to = std::isnan(value) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Lanes All(float value) { return value - Lanes{}; }

inline Lanes Load(const float* from) {
  Lanes values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
inline Lanes Load(const uint16_t* from) {
  using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
  using Unsigned = uint32_t __attribute__((vector_size(4 * kLanes)));
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Lanes>(__builtin_convertvector(halves, Unsigned) << 16);
}
// The first `count` values, then zeros.
template <typename T>
Lanes LoadSome(const T* from, int64_t count) {
  T some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(T));
  return Load(some);
}
// Of the values from `at` to `size`, the next 16 or the rest.
template <typename T>
Lanes LoadAt(const T* from, int64_t at, int64_t size) {
  return at + kLanes <= size ? Load(from + at) : LoadSome(from + at, size - at);
}

inline void Store(Lanes values, float* to, int64_t count) {
  std::memcpy(to, &values, std::min<int64_t>(count, kLanes) * sizeof(float));
}

// a * b + c, rounded once.
inline Lanes Fma(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                 reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof(a));
  std::memcpy(y, &b, sizeof(b));
  std::memcpy(z, &c, sizeof(c));
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, sizeof(c));
  return c;
#else
  for (int l = 0; l < kLanes; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
#endif
}

inline float Sum(Lanes values) {
  using Eight = float __attribute__((vector_size(32)));
  using Four = float __attribute__((vector_size(16)));
  Eight eights[2];
  Four fours[2];
  std::memcpy(eights, &values, sizeof(values));
  eights[0] += eights[1];
  std::memcpy(fours, eights, sizeof(fours));
  fours[0] += fours[1];
  return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}
inline float Max(Lanes values) {
  float v[kLanes];
  std::memcpy(v, &values, sizeof(v));
  return *std::max_element(v, v + kLanes);
}

// exp(x), off by less than 2e-7 of it; 0 below -87, and above 88 as at 88.
inline Lanes Exp(Lanes x) {
  const Lanes low = All(-87.0f), high = All(88.0f);
  const Words gone = x < low;
  x = gone ? low : x > high ? high : x;
  // x = n ln 2 + r; adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
  const Lanes magic = All(12582912.0f);
  const Lanes n = Fma(x, All(1.44269504088896341f), magic) - magic;
  Lanes r = Fma(n, All(-0.693359375f), x);
  r = Fma(n, All(2.12194440e-4f), r);
  Lanes p = All(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f}) {
    p = Fma(p, r, All(c));
  }
  p = Fma(Fma(p, r * r, r), All(1.0f), All(1.0f));
  const Words power = (__builtin_convertvector(n, Words) + 127) << 23;
  p = p * reinterpret_cast<Lanes>(power);
  return gone ? Lanes{} : p;
}
inline float Exp(float x) { return Exp(All(x))[0]; }

}  // namespace lanes
