// Philox4x32-10 (Salmon et al., SC 2011) over many counters. Integers only: on every CPU the bits are those of noise.py.
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr uint32_t MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u, STEP_0 = 0x9E3779B9u, STEP_1 = 0xBB67AE85u;

struct Key { uint32_t low, high; };

void one(Key key, uint32_t a, uint32_t b, uint32_t c, uint32_t* out) {
  uint32_t d = 0;
  for (int round = 0; round < 10; ++round, key.low += STEP_0, key.high += STEP_1) {
    const uint64_t first = (uint64_t)a * MULTIPLIER_0, second = (uint64_t)c * MULTIPLIER_1;
    a = (uint32_t)(second >> 32) ^ b ^ key.low;
    b = (uint32_t)second;
    c = (uint32_t)(first >> 32) ^ d ^ key.high;
    d = (uint32_t)first;
  }
  out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

#if defined(__x86_64__)
// A word sits in the low half of a 64-bit lane; what gathers in the high half is never read.
__attribute__((target("avx512f"))) void eight(Key key, uint32_t position, uint32_t choice, const int64_t* blocks, uint32_t* out) {
  __m512i a = _mm512_set1_epi64(position), b = _mm512_set1_epi64(choice), c = _mm512_loadu_si512(blocks), d = _mm512_setzero_si512();
  for (int round = 0; round < 10; ++round, key.low += STEP_0, key.high += STEP_1) {
    const __m512i first = _mm512_mul_epu32(a, _mm512_set1_epi64(MULTIPLIER_0));
    const __m512i second = _mm512_mul_epu32(c, _mm512_set1_epi64(MULTIPLIER_1));
    a = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(second, 32), b), _mm512_set1_epi64(key.low));
    b = second;
    c = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(first, 32), d), _mm512_set1_epi64(key.high));
    d = first;
  }
  const __m512i low = _mm512_set1_epi64(0xffffffff);
  const __m512i ab = _mm512_or_si512(_mm512_and_si512(a, low), _mm512_slli_epi64(b, 32));
  const __m512i cd = _mm512_or_si512(_mm512_and_si512(c, low), _mm512_slli_epi64(d, 32));
  const __m512i first_four = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), last_four = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(ab, first_four, cd));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64(ab, last_four, cd));
}
#endif

}  // namespace

// Counters are (position, choice, blocks[i], 0) with 0 <= blocks[i] < 2**32; out: (count, 4).
extern "C" void philox_blocks(uint64_t seed, uint32_t position, uint32_t choice, const int64_t* blocks, int64_t count, uint32_t* out) {
  const Key key{(uint32_t)seed, (uint32_t)(seed >> 32)};
  int64_t at = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f"))
    for (; at + 8 <= count; at += 8) eight(key, position, choice, blocks + at, out + 4 * at);
#endif
  for (; at < count; ++at) one(key, position, choice, (uint32_t)blocks[at], out + 4 * at);
}
