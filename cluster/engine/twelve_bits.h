// bf16 weights in 12 bits, without loss: all but a few in ten thousand weights of a trained matrix share sixteen values of
// the upper byte (sign and seven bits of exponent), so four bits stand for it. A step that waits for memory reads a quarter
// less; putting four lines together again takes seven operations.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdint>
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define TWELVE_BIT_WEIGHTS 1
#include <immintrin.h>
#else
#define TWELVE_BIT_WEIGHTS 0
#endif

namespace {

constexpr int GROUP = 4, GROUP_BYTES = 192;  // lines that are coded together: of 64 bytes each, in three

// A weight whose upper byte has no code. Each block's strays are in order, and end with one of no step.
struct Stray {
  int32_t step;  // the first of two
  uint8_t line, word;
  uint16_t bits;
};

// What a coded matrix needs beside its groups; a matrix as it is has none.
struct Codes {
  const uint8_t* upper;   // (16)
  const Stray* strays;
  const int32_t* starts;  // (blocks): where a block's strays begin
};

// Where word `word` of line `line` is in a group: its lower byte, and its code, a half of a byte. This order is the one
// in which the processor's unpacking instructions give whole lines.
struct Place {
  int lower, code;
  bool second_half;
  Place(int line, int word) {
    const int at = word / 8 * 16 + line % 2 * 8 + word % 8;
    lower = 64 + line / 2 * 64 + at, code = at, second_half = line >= 2;
  }
};

// words: (blocks, steps, 32), steps divisible by GROUP; out: (blocks, steps / GROUP, GROUP_BYTES) of zeros. strays: room
// for all of them and one more for each block.
void encode(const uint16_t* words, int blocks, int steps, const uint8_t* upper, uint8_t* out, Stray* strays, int32_t* starts) {
  int code_of[256];
  for (int& code : code_of) code = -1;
  for (int c = 0; c < 16; ++c) code_of[upper[c]] = c;
  int count = 0;
  for (int block = 0; block < blocks; ++block) {
    starts[block] = count;
    for (int group = 0; group < steps; group += GROUP, out += GROUP_BYTES)
      for (int line = 0; line < GROUP; ++line)
        for (int word = 0; word < 32; ++word, ++words) {
          const Place place(line, word);
          const int code = code_of[*words >> 8];
          out[place.lower] = (uint8_t)*words;
          if (code < 0)
            strays[count++] = {group + line / 2 * 2, (uint8_t)(line % 2), (uint8_t)word, *words};
          else
            out[place.code] |= (uint8_t)(place.second_half ? code << 4 : code);
        }
    strays[count++] = {INT_MAX, 0, 0, 0};
  }
}

#if TWELVE_BIT_WEIGHTS
// The lines of B blocks, two steps at a time.
template <int B> struct TwelveBits {
  static constexpr int GRAIN = 2, FEW = 0;
  static constexpr bool COSTLY = false;
  const uint8_t* groups;
  size_t size;  // of a block
  const Stray* strays[B];
  int next = INT_MAX;  // the step of the first stray
  __m512i here[B][GRAIN];
  __m512i upper;  // the codes' meanings, four times, so that the two bits above a code do not matter

  TwelveBits(const void* weight, const Codes& codes, int steps, int block)
      : groups((const uint8_t*)weight + (size_t)block * (steps / GROUP) * GROUP_BYTES),
        size((size_t)(steps / GROUP) * GROUP_BYTES),
        upper(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes.upper))) {
    for (int b = 0; b < B; ++b) {
      strays[b] = codes.strays + codes.starts[block + b];
      next = std::min(next, strays[b]->step);
    }
  }

  template <bool AHEAD> inline __attribute__((always_inline)) void begin(int step) {
    const bool second = step % GROUP;
    const uint8_t* group = groups + (size_t)(step / GROUP) * GROUP_BYTES;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const uint8_t *codes_at = group + b * size, *low_at = codes_at + (second ? 128 : 64);
      if (AHEAD) {
        if (!second) __builtin_prefetch(codes_at + B * size, 0, 2);
        __builtin_prefetch(low_at + B * size, 0, 2);
      }
      const __m512i codes = _mm512_loadu_si512(codes_at), low = _mm512_loadu_si512(low_at);
      const __m512i high = _mm512_permutexvar_epi8(second ? _mm512_srli_epi16(codes, 4) : codes, upper);
      here[b][0] = _mm512_unpacklo_epi8(low, high);
      here[b][1] = _mm512_unpackhi_epi8(low, high);
    }
    if (__builtin_expect(step != next, 1)) return;
    next = INT_MAX;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      for (; strays[b]->step == step; ++strays[b])
        for (int i = 0; i < GRAIN; ++i)
          here[b][i] = _mm512_mask_set1_epi16(here[b][i], strays[b]->line == i ? 1u << strays[b]->word : 0u, (short)strays[b]->bits);
      next = std::min(next, strays[b]->step);
    }
  }

  __m512i line(int b, int i) const { return here[b][i]; }
};
#endif

}  // namespace
