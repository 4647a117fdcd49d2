// Sixteen floats, in the instructions that this file is compiled for. The same operations give the
// same bits for every instruction set: sums and products are rounded once each, or together in `Fma`.
// Must be compiled with -ffp-contract=off.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dance::DANCE_ISA {

constexpr int64_t kLanes = 16;

// The portable form, and the fallback of the other instruction sets for rare operations.
using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Signed = int32_t __attribute__((vector_size(64)));

inline float Fma(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)

using Vector = __m512;
inline Vector Fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector Load(const float* from) { return _mm512_loadu_ps(from); }
inline void Store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline Vector Same(float value) { return _mm512_set1_ps(value); }
inline Vector FromBfloat16(const char* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vector FromFloat16(const char* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Vector FromInt8(const char* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

#elif defined(__AVX2__)

struct Vector {
  __m256 low, high;
};
inline Vector operator*(Vector a, Vector b) { return {a.low * b.low, a.high * b.high}; }
inline Vector operator+(Vector a, Vector b) { return {a.low + b.low, a.high + b.high}; }
inline Vector operator-(Vector a, Vector b) { return {a.low - b.low, a.high - b.high}; }
inline Vector operator/(Vector a, Vector b) { return {a.low / b.low, a.high / b.high}; }
inline Vector Fma(Vector a, Vector b, Vector c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vector Load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void Store(float* to, Vector value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}
inline Vector Same(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline __m128i Bytes(const char* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
inline __m256 WideBfloat16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vector FromBfloat16(const char* from) {
  return {WideBfloat16(Bytes(from)), WideBfloat16(Bytes(from + 16))};
}
inline Vector FromFloat16(const char* from) {
  return {_mm256_cvtph_ps(Bytes(from)), _mm256_cvtph_ps(Bytes(from + 16))};
}
inline Vector FromInt8(const char* from) {
  const __m128i bytes = Bytes(from);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

#else

using Vector = Floats;
inline Vector Fma(Vector a, Vector b, Vector c) {
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__aarch64__)
  for (int64_t i = 0; i < kLanes; ++i) c[i] = Fma(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
inline Vector Load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline void Store(float* to, Vector value) { std::memcpy(to, &value, sizeof(value)); }
inline Vector Same(float value) { return Vector{} + value; }
// Loads and widens integers.
template <typename Integer>
inline Signed Integers(const char* from) {
  Integer values __attribute__((vector_size(kLanes * sizeof(Integer))));
  std::memcpy(&values, from, sizeof(values));
  return __builtin_convertvector(values, Signed);
}
inline Vector FromBfloat16(const char* from) {
  return reinterpret_cast<Vector>(Integers<uint16_t>(from) << 16);
}
// Converts float16 values in the lowest bits.
inline Vector FromHalves(Signed halves) {
  // A product moves the exponent's bias; the product is exact for subnormal numbers too.
  const Signed bits = (halves & 0x7fff) << 13;
  const Signed special = bits >= 0x0f800000;  // infinity and NaN
  const Signed magnitude = reinterpret_cast<Signed>(reinterpret_cast<Vector>(bits) * 0x1p112f);
  const Signed sign = (halves & 0x8000) << 16;
  return reinterpret_cast<Vector>(((bits | 0x70000000) & special) | (magnitude & ~special) | sign);
}
inline Vector FromFloat16(const char* from) { return FromHalves(Integers<uint16_t>(from)); }
inline Vector FromInt8(const char* from) {
  return __builtin_convertvector(Integers<int8_t>(from), Vector);
}

#endif

inline Vector Zero() { return Same(0.0f); }

// `value`, with 0 in the lanes where x is less than `limit`.
inline Vector ZeroBelow(Vector x, float limit, Vector value) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, Same(limit), _CMP_NLT_UQ), value);
#elif defined(__AVX2__)
  const __m256 bound = _mm256_set1_ps(limit);
  return {_mm256_and_ps(_mm256_cmp_ps(x.low, bound, _CMP_NLT_UQ), value.low),
          _mm256_and_ps(_mm256_cmp_ps(x.high, bound, _CMP_NLT_UQ), value.high)};
#else
  for (int64_t i = 0; i < kLanes; ++i) value[i] = x[i] < limit ? 0.0f : value[i];
  return value;
#endif
}

// Sum: of the lanes, added as a tree. Max: the largest lane.
inline float Sum(Vector value) {
  float v[kLanes];
  Store(v, value);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}
inline float Max(Vector value) {
  float v[kLanes];
  Store(v, value);
  return *std::max_element(v, v + kLanes);
}

// LoadSome: the first `count` values, then zeros. StoreSome: stores only the first `count` values.
inline Vector LoadSome(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  float values[kLanes] = {};
  std::memcpy(values, from, count * sizeof(float));
  return Load(values);
}
inline void StoreSome(float* to, Vector value, int64_t count) {
  if (count >= kLanes) return Store(to, value);
  float values[kLanes];
  Store(values, value);
  std::memcpy(to, values, count * sizeof(float));
}

// bfloat16 values are the upper halves of floats.
inline Vector Load(const uint16_t* from) { return FromBfloat16(reinterpret_cast<const char*>(from)); }
inline Vector LoadSome(const uint16_t* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  uint16_t values[kLanes] = {};
  std::memcpy(values, from, count * sizeof(uint16_t));
  return Load(values);
}
inline float ToFloat(float value) { return value; }
inline float ToFloat(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void Round(float value, float* to) { *to = value; }
// Rounds to the nearest bfloat16, ties to even.
inline void Round(float value, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  *to = std::isnan(value) ? 0x7fc0
                          : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline Words Bits(Vector value) {
  Words bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline Vector OfBits(Words bits) {
  Vector value;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// Shifts e4m3 to the float16 with the same bits, which is 2^-8 times the value; exact.
inline Vector FromFp8(const char* from) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  // Sign extension puts the sign where float16 has it; the mask removes the other copies of the sign.
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  const __m256i half = _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<short>(0xbfff)));
  alignas(32) char halves[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(halves), half);
  return FromFloat16(halves) * Same(256.0f);
#else
  return FromHalves((Integers<int8_t>(from) << 7) & 0xbfff) * Same(256.0f);
#endif
}

// Powers of two from exponents with a bias of 127; exponent 0 is 2^-127.
inline Vector FromE8m0(const char* from) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
  return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x00400000)));
#elif defined(__AVX2__)
  Words bits;
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint32_t byte = static_cast<unsigned char>(from[i]);
    bits[i] = byte == 0 ? 0x00400000u : byte << 23;
  }
  return OfBits(bits);
#else
  const Signed bytes = Integers<uint8_t>(from);
  return reinterpret_cast<Vector>(bytes << 23 | ((bytes == 0) & 0x00400000));
#endif
}

// e^x to two units in the last place. 0 below -87; above 88 the value at 88.
inline Vector Exp(Vector x) {
  constexpr float kLeast = -87.0f, kMost = 88.0f, kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kRound = 12582912.0f;
  const Vector given = x;
#if defined(__AVX512F__)
  x = _mm512_max_ps(_mm512_min_ps(x, Same(kMost)), Same(kLeast));
#elif defined(__AVX2__)
  const __m256 most = _mm256_set1_ps(kMost), least = _mm256_set1_ps(kLeast);
  x = {_mm256_max_ps(_mm256_min_ps(x.low, most), least),
       _mm256_max_ps(_mm256_min_ps(x.high, most), least)};
#else
  for (int64_t i = 0; i < kLanes; ++i) x[i] = std::fmax(std::fmin(x[i], kMost), kLeast);
#endif
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to the nearest integer, which is then in the low bits.
  const Vector shifted = Fma(x, Same(kLog2e), Same(kRound));
  const Vector n = shifted - Same(kRound);
  Vector r = Fma(n, Same(-kLn2High), x);
  r = Fma(n, Same(-kLn2Low), r);
  Vector sum = Same(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                           5.0000001201e-1f}) {
    sum = Fma(sum, r, Same(term));
  }
  sum = Fma(sum * r, r, r) + Same(1.0f);
  return ZeroBelow(given, kLeast, OfBits(Bits(sum) + (Bits(shifted) << 23)));
}
inline float Exp(float x) {
  float values[kLanes];
  Store(values, Exp(Same(x)));
  return values[0];
}

inline Vector Sigmoid(Vector x) { return Same(1.0f) / (Same(1.0f) + Exp(Zero() - x)); }

}  // namespace dance::DANCE_ISA
