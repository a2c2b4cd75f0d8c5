// Packed linear: weights as [block of 16 outputs][step][64 bytes]; a step is one k in fp32, a pair of k in bf16. Those
// of bf16 may be kept in fewer bits (twelve_bits.h, affine.h).
#pragma once
#include <algorithm>
#include <vector>

#include "affine.h"
#include "twelve_bits.h"
#include "simd.h"
#include "team.h"

namespace {

// What a thread multiplies weights with: fp32 rows, or bf16 pairs as one 32-bit word where the CPU multiplies those.
#if defined(__AVX512BF16__)
using pairs = uint32_t;
inline v16 step(__m512i w, const pairs* x, v16 sum) {
  int pair;
  memcpy(&pair, x, 4);
  return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
}
inline v16 step(const bf16* w, const pairs* x, v16 sum) { return step(_mm512_loadu_si512(w), x, sum); }
#else
struct __attribute__((may_alias)) pairs { float low, high; };
inline v16 step(const bf16* w, const pairs* x, v16 sum) {
  return fma16(load_odd(w), splat(x->high), fma16(load_even(w), splat(x->low), sum));
}
#endif
inline v16 step(const float* w, const float* x, v16 sum) { return fma16(load16(w), splat(*x), sum); }

// The lines of B blocks as they are, a step at a time.
template <class T, int B> struct PlainLines {
  static constexpr int GRAIN = 1, FEW = FEW_ROWS, LINE = 64 / sizeof(T);
  static constexpr bool COSTLY = false;
  const T* weight;
  size_t size;  // of a block
  const T* here;

  PlainLines(const void* weight, const Codes&, int steps, int block)
      : weight((const T*)weight + (size_t)block * steps * LINE), size((size_t)steps * LINE) {}

  template <bool AHEAD> void begin(int step) {
    here = weight + (size_t)step * LINE;
    for (int b = 0; AHEAD && b < B; ++b) __builtin_prefetch(here + (b + B) * size, 0, 2);
  }
  const T* line(int b, int) const { return here + b * size; }
};
template <int B> using PlainFloats = PlainLines<float, B>;
template <int B> using PlainPairs = PlainLines<bf16, B>;

inline const float* stage(const float* x, int, int, std::vector<float>&) { return x; }
const pairs* stage(const bf16* x, int rows, int k, std::vector<pairs>& buffer) {
  if (sizeof(pairs) == 4 && k % 2 == 0) return (const pairs*)x;
  int steps = (k + 1) / 2;
  buffer.resize((size_t)rows * steps);
  for (int r = 0; r < rows; ++r)
    for (int s = 0; s < steps; ++s) {
      bf16 pair[2] = {x[(size_t)r * k + 2 * s], 2 * s + 1 < k ? x[(size_t)r * k + 2 * s + 1] : bf16{0}};
#if defined(__AVX512BF16__)
      memcpy(&buffer[(size_t)r * steps + s], pair, 4);
#else
      buffer[(size_t)r * steps + s] = {to_float(pair[0]), to_float(pair[1])};
#endif
    }
  return buffer.data();
}

// Lines that stay in memory as well, (blocks, steps, 32), for further rows.
template <class Lines> struct Kept : Lines {
  bf16* memory;
  int steps;

  Kept(const Lines& lines, bf16* memory, int steps) : Lines(lines), memory(memory), steps(steps) {}
  inline __attribute__((always_inline)) auto line(int b, int i) {
    const auto now = Lines::line(b, i);
    memcpy(memory + ((size_t)b * steps + Lines::at + i) * 32, &now, 64);
    return now;
  }
};

// How weights are kept: packed.py's numbers, and PLAIN for those without codes.
enum Form : int32_t { PLAIN, TWELVE_BITS, FOUR_BITS, EIGHT_BITS };

template <class T, class X> struct Linear {
  const X* x;             // (rows, steps)
  const T* weight;        // (blocks, steps, 64 bytes), or as twelve_bits.h and affine.h have it
  Form form;
  Codes codes;
  const float* bias;      // (16 * blocks) or null
  const T* residual;      // (rows, outputs) or null
  void* out;              // (rows, outputs) of T, or of float where wide
  int rows, steps, outputs;
  bool wide, gated;       // gated: blocks alternate gate and up; the output is silu(gate) * up
  const X* low;           // (rows, low_steps): an adapter's narrow inputs; they go on where x ends
  const T* outer;         // (blocks, low_steps, 64 bytes)
  int low_steps;

  int blocks() const { return gated ? (outputs + 15) / 16 * 2 : (outputs + 15) / 16; }

  void finish(int row, int block, const v16* sums, int count) const {
    const T* kind = nullptr;
    for (int b = 0; b < count; b += gated ? 2 : 1) {
      int column = (gated ? (block + b) / 2 : block + b) * 16, width = outputs - column;
      size_t at = (size_t)row * outputs + column;
      v16 sum = sums[b];
      if (bias) sum += load16(bias + (block + b) * 16);
      if (wide) {
        store_part((float*)out + at, sum, width);
        continue;
      }
      if (gated && b + 1 < count) {
        v16 up = sums[b + 1];
        if (bias) up += load16(bias + (block + b + 1) * 16);
        sum = round16(silu16(round16(sum, kind)), kind) * round16(up, kind);
      }
      if (residual) sum = load_part(residual + at, width) + round16(sum, kind);
      store_part((T*)out + at, sum, width);
    }
  }

  // R rows times B blocks. AHEAD: the same lines of the next B blocks are fetched meanwhile, so that arithmetic and
  // memory overlap; the hardware's own look-ahead ends at each page. Behind a matrix, the next one to multiply with is
  // likely to stand.
  template <int R, int B, bool AHEAD, class Lines> void tile(Lines lines, int row, int block) const {
    constexpr int line = 64 / sizeof(T);
    const X* first = x + (size_t)row * steps;
    v16 sums[R][B] = {};
    for (int i = 0; i < B * low_steps; ++i) __builtin_prefetch(outer + ((size_t)block * low_steps + i) * line, 0, 2);
    for (int s = 0; s < steps; s += Lines::GRAIN) {
      lines.template begin<AHEAD>(s);
#pragma GCC unroll 8
      for (int i = 0; i < Lines::GRAIN; ++i) {
        decltype(lines.line(0, 0)) weights[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) weights[b] = lines.line(b, i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
          for (int b = 0; b < B; ++b) sums[r][b] = step(weights[b], first + (size_t)r * steps + s + i, sums[r][b]);
      }
    }
    for (int s = 0; s < low_steps; ++s)
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          sums[r][b] = step(outer + ((size_t)(block + b) * low_steps + s) * line, low + (size_t)(row + r) * low_steps + s, sums[r][b]);
    for (int r = 0; r < R; ++r) finish(row + r, block, sums[r], B);
  }

  // The first tile's rows are those that make no whole one, if there are such.
  template <int B, class First, class Lines> void tiles(const First& first, const Lines& lines, int block) const {
    switch (rows % TILE_ROWS) {
      case 7: tile<7, B, true>(first, 0, block); break;
      case 6: tile<6, B, true>(first, 0, block); break;
      case 5: tile<5, B, true>(first, 0, block); break;
      case 4: tile<4, B, true>(first, 0, block); break;
      case 3: tile<3, B, true>(first, 0, block); break;
      case 2: tile<2, B, true>(first, 0, block); break;
      case 1: tile<1, B, true>(first, 0, block); break;
    }
    int row = rows % TILE_ROWS;
    if (row == 0) tile<TILE_ROWS, B, true>(first, row, block), row = TILE_ROWS;
    for (; row < rows; row += TILE_ROWS) tile<TILE_ROWS, B, false>(lines, row, block);
  }

  template <template <int> class Lines, int B> void rows_of(int block) const {
    const Lines<B> lines(weight, codes, steps, block);
    if constexpr (Lines<B>::COSTLY) {
      if (rows > TILE_ROWS) {
        struct alignas(64) Line { bf16 words[32]; };
        static thread_local std::vector<Line> memory;
        memory.resize((size_t)B * steps);
        return tiles<B>(Kept<Lines<B>>(lines, memory.data()->words, steps), PlainPairs<B>(memory.data(), codes, steps, 0), block);
      }
    }
    tiles<B>(lines, lines, block);
  }

  template <template <int> class Lines, int B> void blocks_of(int& block, int end) const {
    for (; block + B <= end; block += B) rows_of<Lines, B>(block);
  }

  template <template <int> class Lines> void all_of(int block, int end) const {
    if (rows <= Lines<1>::FEW) blocks_of<Lines, 4>(block, end);
    blocks_of<Lines, 2>(block, end);
    if (block < end) rows_of<Lines, 1>(block);
  }

  int pairs_of_blocks() const { return (blocks() + 1) / 2; }

  void run(int first_pair, int last_pair) const {
    const int block = first_pair * 2, end = last_pair * 2 < blocks() ? last_pair * 2 : blocks();
    if constexpr (sizeof(T) == 4) {
      all_of<PlainFloats>(block, end);
    } else {
      switch (form) {
        case PLAIN: all_of<PlainPairs>(block, end); break;
#if TWELVE_BIT_WEIGHTS
        case TWELVE_BITS: all_of<TwelveBits>(block, end); break;
#endif
#if AFFINE_WEIGHTS
        case FOUR_BITS: all_of<FourBits>(block, end); break;
        case EIGHT_BITS: all_of<EightBits>(block, end); break;
#endif
      }
    }
  }
};

// weight x, and outer (inner x) added to it where there is a rank.
template <class T> struct Matrix {
  const T* weight;
  Codes codes;
  const float* bias;
  const T *inner, *outer;
  int32_t rank;
  Form form;
};

// (rows, inputs) -> (rows, outputs): of T, rounded and added to residual if there is one, or of float where wide.
// A wide one is the last operation of its call. input(): the rows to multiply, for the thread that asks; what an adapter
// narrows them to, each thread computes itself.
template <class T, class X, class Input>
void multiply(Walk& walk, const Input& input, int rows, int inputs, Matrix<T> matrix, const T* residual, void* out,
              int outputs, bool wide, bool gated) {
  const auto steps = [](int count) { return sizeof(T) == 2 ? (count + 1) / 2 : count; };
  Linear<T, X> shape{nullptr, matrix.weight, matrix.form, matrix.codes, matrix.bias, residual, out, rows, steps(inputs),
                     outputs, wide, gated, nullptr, matrix.outer, steps(matrix.rank)};
  const int64_t weight = (int64_t)shape.blocks() * shape.steps * 64;
  const int parts = weight < 1 << 19 ? 1 : std::max(walk.parts(), (int)(weight >> 20));
  walk.each(
      shape.pairs_of_blocks(), parts,
      [&] {
        static thread_local std::vector<X> staged, staged_narrow;
        static thread_local std::vector<T> narrow;
        Linear<T, X> linear = shape;
        linear.x = stage(input(), rows, inputs, staged);
        if (matrix.rank) {
          narrow.resize((size_t)rows * matrix.rank);
          Linear<T, X> inner{linear.x, matrix.inner, PLAIN, {}, nullptr, nullptr, narrow.data(), rows, linear.steps, matrix.rank,
                             false, false, nullptr, nullptr, 0};
          inner.run(0, inner.pairs_of_blocks());
          linear.low = stage(narrow.data(), rows, matrix.rank, staged_narrow);
        }
        return linear;
      },
      [](const Linear<T, X>& linear, int first, int last) { linear.run(first, last); },
      wide);
}

}  // namespace
