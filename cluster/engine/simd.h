// Vectors of 16 floats, bf16 conversion, and the one exponential. GCC's vector types, so AVX2 and AVX-512 share the code;
// but GCC keeps what is wider than a register in memory, so sums of products have a type of their own.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

typedef float v16 __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t h32 __attribute__((vector_size(64)));
struct bf16 { uint16_t bits; };

inline v16 splat(float x) { return x - v16{}; }

inline v16 fma16(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
  return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  v16 sum;
  for (int i = 0; i < 16; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#endif
}

inline float hsum(v16 v) {
  v8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline void store(float* out, float x) { *out = x; }
inline void store(bf16* out, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  out->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T> inline float rounded(float x) {
  T stored;
  store(&stored, x);
  return to_float(stored);
}

inline v16 round16(v16 x, const float*) { return x; }
inline v16 round16(v16 x, const bf16*) {
  u16 bits = (u16)x;
  return (v16)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

inline v16 load16(const float* p) {
  v16 v;
  memcpy(&v, p, 64);
  return v;
}
inline v16 load16(const bf16* p) {
  h16 half;
  memcpy(&half, p, 32);
  return (v16)(__builtin_convertvector(half, u16) << 16);
}
// The first `count` of 16 elements; the others are zero.
template <class T> inline v16 load_part(const T* p, int count) {
  if (count >= 16) return load16(p);
  T part[16] = {};
  memcpy(part, p, count * sizeof(T));
  return load16(part);
}

#if defined(__AVX512F__) || !defined(__FMA__)
typedef v16 sum16;
constexpr int TILE_ROWS = 8, FEW_ROWS = 4;  // that registers have room for, beside two blocks of outputs, and beside four
inline v16 whole(sum16 sum) { return sum; }
inline sum16 add_product(const float* w, float x, sum16 sum) { return fma16(load16(w), splat(x), sum); }
// 16 pairs, each with one.
inline sum16 add_products(const bf16* w, float low, float high, sum16 sum) {
  u16 both;
  memcpy(&both, w, 64);
  return fma16((v16)(both & 0xffff0000u), splat(high), fma16((v16)(both << 16), splat(low), sum));
}
#else
struct sum16 { __m256 half[2]; };
constexpr int TILE_ROWS = 2, FEW_ROWS = 1;
inline v16 whole(sum16 sum) {
  v16 v;
  memcpy(&v, &sum, 64);
  return v;
}
inline sum16 add_product(const float* w, float x, sum16 sum) {
  const __m256 factor = _mm256_set1_ps(x);
  return {_mm256_fmadd_ps(_mm256_loadu_ps(w), factor, sum.half[0]), _mm256_fmadd_ps(_mm256_loadu_ps(w + 8), factor, sum.half[1])};
}
inline sum16 add_products(const bf16* w, float low, float high, sum16 sum) {
  const __m256 first = _mm256_set1_ps(low), second = _mm256_set1_ps(high);
  const __m256i a = _mm256_loadu_si256((const __m256i*)w), b = _mm256_loadu_si256((const __m256i*)(w + 16));
  const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
  const auto odd = [&](__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)); };
  const auto even = [&](__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); };
  return {_mm256_fmadd_ps(odd(a), second, _mm256_fmadd_ps(even(a), first, sum.half[0])),
          _mm256_fmadd_ps(odd(b), second, _mm256_fmadd_ps(even(b), first, sum.half[1]))};
}
#endif

inline void store16(float* p, v16 x) { memcpy(p, &x, 64); }
inline void store16(bf16* p, v16 x) {
  h16 half = __builtin_convertvector((u16)round16(x, (const bf16*)nullptr) >> 16, h16);
  memcpy(p, &half, 32);
}
template <class T> inline void store_part(T* p, v16 x, int count) {
  if (count >= 16) return store16(p, x);
  for (int i = 0; i < count; ++i) store(p + i, x[i]);
}

// One compiled copy serves softmax and SiLU. Inputs are clamped to where the result is a normal number.
__attribute__((noinline)) v16 exp16(v16 x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const v16 magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  v16 shifted = fma16(x, splat(1.44269504f), magic);
  v16 n = shifted - magic;
  v16 r = fma16(n, splat(2.12194440e-4f), fma16(n, splat(-0.693359375f), x));
  v16 p = fma16(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  p = fma16(p, r, splat(8.3334519073e-3f));
  p = fma16(p, r, splat(4.1665795894e-2f));
  p = fma16(p, r, splat(1.6666665459e-1f));
  p = fma16(p, r, splat(5.0000001201e-1f));
  p = fma16(p, r * r, r + splat(1.0f));
  return (v16)((i16)p + (((i16)shifted - (i16)magic) << 23));
}

inline v16 silu16(v16 x) { return x / (splat(1.0f) + exp16(-x)); }

}  // namespace
