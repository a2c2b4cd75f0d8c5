// Vectors of 16 floats, bf16 conversion, and the one exponential. With AVX-512 a vector is a register, else two: GCC keeps
// what is wider than a register in memory.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t h32 __attribute__((vector_size(64)));
struct bf16 { uint16_t bits; };

#if defined(__AVX512F__)
typedef float v16 __attribute__((vector_size(64)));
// What registers have room for: rows beside two blocks of outputs, and beside four; queries of 64 dimensions.
constexpr int TILE_ROWS = 8, FEW_ROWS = 4, SCORED = 6, MIXED = 3;

inline v16 splat(float x) { return x - v16{}; }
inline v16 fma16(v16 a, v16 b, v16 c) { return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
// f on each register of the arguments.
template <class F, class... V> inline v16 by_register(const F& f, V... v) { return f(v...); }
inline v8 folded(v16 v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
inline i16 ints(v16 v) { return (i16)v; }
inline u16 bits(v16 v) { return (u16)v; }
inline v16 floats(u16 v) { return (v16)v; }
inline v16 floats(i16 v) { return (v16)v; }
#else
#define INLINE inline __attribute__((always_inline))  // GCC gives up on some of these, at ten times the price
struct v16 {
  v8 half[2];
  float& operator[](int i) { return ((float*)half)[i]; }
  float operator[](int i) const { return ((const float*)half)[i]; }
};
constexpr int TILE_ROWS = 2, FEW_ROWS = 1, SCORED = 2, MIXED = 1;

INLINE v16 splat(float x) { return {(v8)_mm256_set1_ps(x), (v8)_mm256_set1_ps(x)}; }
template <class F, class... V> INLINE v16 by_register(const F& f, V... v) { return {f(v.half[0]...), f(v.half[1]...)}; }
INLINE v16 operator+(v16 a, v16 b) { return {a.half[0] + b.half[0], a.half[1] + b.half[1]}; }
INLINE v16 operator-(v16 a, v16 b) { return {a.half[0] - b.half[0], a.half[1] - b.half[1]}; }
INLINE v16 operator*(v16 a, v16 b) { return {a.half[0] * b.half[0], a.half[1] * b.half[1]}; }
INLINE v16 operator/(v16 a, v16 b) { return {a.half[0] / b.half[0], a.half[1] / b.half[1]}; }
INLINE v16 operator-(v16 a) { return {-a.half[0], -a.half[1]}; }
INLINE v16& operator+=(v16& a, v16 b) { return a = a + b; }
INLINE v16& operator*=(v16& a, v16 b) { return a = a * b; }
INLINE v16 fma16(v16 a, v16 b, v16 c) {
  return {(v8)_mm256_fmadd_ps((__m256)a.half[0], (__m256)b.half[0], (__m256)c.half[0]),
          (v8)_mm256_fmadd_ps((__m256)a.half[1], (__m256)b.half[1], (__m256)c.half[1])};
}
INLINE v8 folded(v16 v) { return v.half[0] + v.half[1]; }
#endif
inline i8 ints(v8 v) { return (i8)v; }
inline u8 bits(v8 v) { return (u8)v; }
inline v8 floats(u8 v) { return (v8)v; }
inline v8 floats(i8 v) { return (v8)v; }

inline v16 least(v16 a, v16 b) { return by_register([](auto a, auto b) { return a > b ? b : a; }, a, b); }
inline v16 most(v16 a, v16 b) { return by_register([](auto a, auto b) { return a < b ? b : a; }, a, b); }

inline float hsum(v16 v) {
  v8 a = folded(v);
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
  return by_register([](auto x) { return floats((bits(x) + 0x7fff + ((bits(x) >> 16) & 1)) & 0xffff0000u); }, x);
}

#if defined(__AVX512F__)
inline v16 load16(const float* p) { return (v16)_mm512_loadu_ps(p); }
inline v16 load16(const bf16* p) {
  h16 half;
  memcpy(&half, p, 32);
  return floats(__builtin_convertvector(half, u16) << 16);
}
// The first, and the second, of 16 pairs.
inline v16 load_even(const bf16* p) { return floats((u16)_mm512_loadu_si512(p) << 16); }
inline v16 load_odd(const bf16* p) { return floats((u16)_mm512_loadu_si512(p) & 0xffff0000u); }
inline void store16(bf16* p, v16 x) {
  h16 half = __builtin_convertvector(bits(round16(x, p)) >> 16, h16);
  memcpy(p, &half, 32);
}
#else
inline u8 load8(const void* p) { return (u8)_mm256_loadu_si256((const __m256i*)p); }
INLINE v16 load16(const float* p) { return {floats(load8(p)), floats(load8(p + 8))}; }
INLINE v16 load16(const bf16* p) {
  const auto widened = [](const bf16* p) { return floats((u8)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16); };
  return {widened(p), widened(p + 8)};
}
INLINE v16 load_even(const bf16* p) { return {floats(load8(p) << 16), floats(load8(p + 16) << 16)}; }
INLINE v16 load_odd(const bf16* p) { return {floats(load8(p) & 0xffff0000u), floats(load8(p + 16) & 0xffff0000u)}; }
INLINE void store16(bf16* p, v16 x) {
  const v16 rounded = round16(x, p);
  for (int i = 0; i < 2; ++i) {
    const h8 part = __builtin_convertvector(bits(rounded.half[i]) >> 16, h8);
    memcpy(p + 8 * i, &part, 16);
  }
}
#endif
// The first `count` of 16 elements; the others are zero.
template <class T> inline v16 load_part(const T* p, int count) {
  if (count >= 16) return load16(p);
  T part[16] = {};
  memcpy(part, p, count * sizeof(T));
  return load16(part);
}

inline void store16(float* p, v16 x) { memcpy(p, &x, 64); }
template <class T> inline void store_part(T* p, v16 x, int count) {
  if (count >= 16) return store16(p, x);
  for (int i = 0; i < count; ++i) store(p + i, x[i]);
}

// One compiled copy serves softmax and SiLU. Inputs are clamped to where the result is a normal number.
__attribute__((noinline)) v16 exp16(v16 x) {
  x = least(most(x, splat(-87.0f)), splat(88.0f));
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
  return by_register([](auto p, auto shifted, auto magic) { return floats(ints(p) + ((ints(shifted) - ints(magic)) << 23)); }, p, shifted, magic);
}

inline v16 silu16(v16 x) { return x / (splat(1.0f) + exp16(-x)); }

}  // namespace
