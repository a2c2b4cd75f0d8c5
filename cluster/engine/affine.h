// bf16 weights that come from codes of four or eight bits, kept as those, without loss. 32 weights of an output that
// follow each other are d * code + m, rounded, with d and m in fp16: GGUF's Q4_0, Q4_1 and Q8_0. d, m and codes are found
// in the weights themselves, so it does not matter which file they came from, in what order, or how they were cut. Only
// zeros may lose their sign, which no sum shows.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "twelve_bits.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define AFFINE_WEIGHTS 1
#else
#define AFFINE_WEIGHTS 0
#endif

namespace {

// A group is what 16 outputs have of 32 inputs: 16 lines of 64 bytes as they are. Here it is a line of 16 d and 16 m, and
// codes of one line behind the other, or, of four bits, four lines in one of 64 bytes.
constexpr int AFFINE_LINES = 16;
constexpr int affine_bytes(int bits) { return 64 + 64 * bits; }

#if AFFINE_WEIGHTS
// Where the code of word `word` of line `line` is in a group.
template <int BITS> struct CodePlace {
  int byte, shift;
  CodePlace(int line, int word) : byte(64 + 32 * line + word), shift(0) {
    if (BITS == 4) byte = 64 + line / 4 * 64 + word % 16 * 4 + line % 4, shift = word / 16 * 4;
  }
};

inline float from_half(uint16_t half) { return _cvtsh_ss(half); }
inline uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
// Numbers of fp16 as integers of the same order.
inline int ordinal(float x) {
  const uint16_t half = to_half(x);
  return half & 0x8000 ? -(half & 0x7fff) : half;
}
inline uint16_t half_at(int ordinal) { return (uint16_t)(ordinal < 0 ? 0x8000 | -ordinal : ordinal); }

// 32 weights, and what they are made of once that is found.
template <int BITS> struct Affine {
  float weights[32];
  uint16_t d, m;
  uint8_t codes[32];

  // Whether they are made of d and m.
  bool made() {
    const float step = from_half(d), start = from_half(m);
    const v16 steps = splat(step), starts = splat(start), scale = splat(step == 0 ? 0 : 1 / step), last = splat((1 << BITS) - 1);
    for (int at = 0; at < 32; at += 16) {
      const v16 weight = load16(weights + at);
      const v16 code = least(most((v16)_mm512_roundscale_ps((__m512)((weight - starts) * scale), 0), v16{}), last);
      const v16 product = round16(fma16(code, steps, starts), (const bf16*)nullptr);
      if (_mm512_cmp_ps_mask((__m512)product, (__m512)weight, _CMP_NEQ_UQ)) return false;
      _mm_storeu_si128((__m128i*)(codes + at), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)code)));
    }
    return true;
  }

  // found() for every number of fp16 that is within `about` of x, or next to those, till it says so.
  template <class Found> static bool any_near(float x, float about, const Found& found) {
    const int last = ordinal(x + about) + 1;
    for (int at = ordinal(x - about) - 1; at <= last; ++at)
      if (found(half_at(at))) return true;
    return false;
  }

  // How far from `weight` a number may be that was rounded to it.
  static float reach(float weight) { return weight ? std::ldexp(1.0f, std::ilogb(weight) - 8) : 0; }

  // Code 0 at `near`, one end of the range, as Q4_0 and Q4_1 have it; the other end, `far`, is mostly the last code.
  bool from_end(float near, float far) {
    for (int last = near == far ? 1 : (1 << BITS) - 1; last > 0; --last)
      if (any_near(near, reach(near), [&](uint16_t start) {
            m = start;
            if (rounded<bf16>(from_half(m)) != near) return false;
            if (near == far) return d = 0, made();
            return any_near((far - from_half(m)) / last, reach(far) / last, [&](uint16_t step) { return d = step, made(); });
          }))
        return true;
    return false;
  }

  // Codes of either sign around 0 for zero, as Q8_0 has them; `far`, the farthest weight, is the last of its sign.
  bool from_middle(float far) {
    constexpr int half = 1 << (BITS - 1);
    return any_near(far / (half - 1), reach(far) / (half - 1), [&](uint16_t step) {
      return d = step, m = to_half(-half * from_half(step)), made();
    });
  }

  bool found() {
    const auto [least, most] = std::minmax_element(weights, weights + 32);
    if (!std::all_of(weights, weights + 32, [](float weight) { return std::isfinite(weight); })) return false;
    if (BITS == 8) return from_middle(std::max(std::abs(*least), std::abs(*most)));
    return from_end(*least, *most) || from_end(*most, *least);
  }
};

// words: (blocks, lines, 16, 2), lines divisible by AFFINE_LINES; out: (blocks, lines / AFFINE_LINES, affine_bytes(BITS))
// of zeros. False, with `out` half done, where there are weights of another make.
template <int BITS> bool encode_affine(const uint16_t* words, int blocks, int lines, uint8_t* out) {
  for (int64_t groups = (int64_t)blocks * (lines / AFFINE_LINES); groups; --groups) {
    for (int output = 0; output < 16; ++output) {
      const auto word = [&](int k) { return 2 * output + k % 2; };
      Affine<BITS> affine;
      for (int k = 0; k < 32; ++k) affine.weights[k] = to_float(bf16{words[k / 2 * 32 + word(k)]});
      if (!affine.found()) return false;
      memcpy(out + 2 * output, &affine.d, 2);
      memcpy(out + 32 + 2 * output, &affine.m, 2);
      for (int k = 0; k < 32; ++k) {
        const CodePlace<BITS> place(k / 2, word(k));
        out[place.byte] |= (uint8_t)(affine.codes[k] << place.shift);
      }
    }
    words += AFFINE_LINES * 32, out += affine_bytes(BITS);
  }
  return true;
}

// The lines of B blocks, each put together while the one before is multiplied.
template <int BITS, int B> struct AffineLines {
  static constexpr int GRAIN = 4, FEW = 1;
  static constexpr bool COSTLY = true;
  const uint8_t* groups;
  size_t size;  // of a block
  int end, at = 0;
  const uint8_t* codes[B];  // of the next four lines
  __m512 d[B][2], m[B][2];  // for the first and the second half of a line
  __m512i next[B];

  AffineLines(const void* weight, const Codes&, int steps, int block) : groups((const uint8_t*)weight), end(steps) {
    size = (size_t)(steps / AFFINE_LINES) * affine_bytes(BITS);
    groups += block * size;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) load(b, 0), next[b] = made(b, 0);
  }

  const uint8_t* group(int b, int step) const { return groups + b * size + (size_t)(step / AFFINE_LINES) * affine_bytes(BITS); }
  static int codes_at(int step) { return 64 + step % AFFINE_LINES * 4 * BITS; }

  inline __attribute__((always_inline)) void load(int b, int step) {
    const uint8_t* from = group(b, step);
    codes[b] = from + codes_at(step);
    if (step % AFFINE_LINES) return;
    const __m512 steps = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
    const __m512 starts = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + 32)));
    const __m512i first = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    d[b][0] = _mm512_permutexvar_ps(first, steps), d[b][1] = _mm512_permutexvar_ps(second, steps);
    m[b][0] = _mm512_permutexvar_ps(first, starts), m[b][1] = _mm512_permutexvar_ps(second, starts);
  }

  inline __attribute__((always_inline)) __m512 half(int b, int i, int half) const {
    if (BITS == 8) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes[b] + 32 * i + 16 * half))));
    // The bits above a code do not matter to a permutation of 16.
    const __m512 meaning = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(codes[b]), 8 * i + 4 * half), meaning);
  }

  inline __attribute__((always_inline)) __m512i made(int b, int i) const {
    const __m512 first = _mm512_fmadd_ps(half(b, i, 0), d[b][0], m[b][0]), second = _mm512_fmadd_ps(half(b, i, 1), d[b][1], m[b][1]);
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
  }

  template <bool AHEAD> inline __attribute__((always_inline)) void begin(int step) {
    at = step;
#pragma GCC unroll 8
    for (int b = 0; AHEAD && b < B; ++b) {
      const uint8_t* ahead = group(b + B, step);
      if (step % AFFINE_LINES == 0) __builtin_prefetch(ahead, 0, 2);
      for (int line = 0; line < BITS / 4; ++line) __builtin_prefetch(ahead + codes_at(step) + 64 * line, 0, 2);
    }
  }

  inline __attribute__((always_inline)) __m512i line(int b, int i) {
    const __m512i now = next[b];
    if (i == GRAIN - 1 && at + GRAIN < end) load(b, at + GRAIN);
    next[b] = made(b, (i + 1) % GRAIN);
    return now;
  }
};
template <int B> using FourBits = AffineLines<4, B>;
template <int B> using EightBits = AffineLines<8, B>;
#endif

}  // namespace
