// Attention of a tree's rows over their slots' prefixes and their own ancestors.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "linear.h"
#include "simd.h"

namespace {

constexpr int MAX_VECTORS = 32, RUN = 8;

// In place over `count` scores, padded to whole vectors with zeros.
inline void softmax(v16* scores, int count) {
  const int padded = (count + 15) / 16;
  v16 tops = splat(-INFINITY), total = {};
  for (int i = count; i < padded * 16; ++i) scores[padded - 1][i % 16] = -INFINITY;
  for (int b = 0; b < padded; ++b) tops = most(tops, scores[b]);
  float top = tops[0];
  for (int i = 1; i < 16; ++i) top = tops[i] > top ? tops[i] : top;
  for (int b = 0; b < padded; ++b) scores[b] = exp16(scores[b] - splat(top));
  for (int i = count; i < padded * 16; ++i) scores[padded - 1][i % 16] = 0.0f;
  for (int b = 0; b < padded; ++b) total += scores[b];
  v16 share = splat(1.0f / hsum(total));
  for (int b = 0; b < padded; ++b) scores[b] *= share;
}

// What up to RUN rows of one slot attend to, at one KV head, in position order: a committed prefix that they share, then
// each row's own path through the scratch.
template <class T> struct Run {
  const T *keys, *values;  // position 0 of the slot
  size_t stride;           // elements from one position to the next
  int rows, prefix;
  const int32_t* paths[RUN];
  int counts[RUN];         // prefix and path

  size_t at(int row, int i) const { return (i < prefix ? i : prefix + paths[row][i - prefix]) * stride; }
};

// The first `count` of 64 bytes' elements; the others are zero.
template <class T> inline u16 load_words(const T* p, int count) {
  u16 words = {};
  if (count * (int)sizeof(T) >= 64) memcpy(&words, p, 64);
  else memcpy(&words, p, count * sizeof(T));
  return words;
}

#if defined(__AVX512F__)
typedef uint64_t l8 __attribute__((vector_size(64)));

// Rows become columns: words, pairs of words, and quarters of a row change places, each within its neighbours.
inline void transpose(u16* rows) {
  l8 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = (l8)__builtin_shufflevector(rows[i], rows[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    pairs[i + 1] = (l8)__builtin_shufflevector(rows[i], rows[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = __builtin_shufflevector(pairs[i + j], pairs[i + 2 + j], 0, 8, 2, 10, 4, 12, 6, 14);
      fours[i + 2 * j + 1] = __builtin_shufflevector(pairs[i + j], pairs[i + 2 + j], 1, 9, 3, 11, 5, 13, 7, 15);
    }
  for (int j = 0; j < 4; ++j) {
    l8 low = __builtin_shufflevector(fours[j], fours[4 + j], 0, 1, 4, 5, 8, 9, 12, 13);
    l8 low2 = __builtin_shufflevector(fours[8 + j], fours[12 + j], 0, 1, 4, 5, 8, 9, 12, 13);
    l8 high = __builtin_shufflevector(fours[j], fours[4 + j], 2, 3, 6, 7, 10, 11, 14, 15);
    l8 high2 = __builtin_shufflevector(fours[8 + j], fours[12 + j], 2, 3, 6, 7, 10, 11, 14, 15);
    rows[j] = (u16)__builtin_shufflevector(low, low2, 0, 1, 4, 5, 8, 9, 12, 13);
    rows[8 + j] = (u16)__builtin_shufflevector(low, low2, 2, 3, 6, 7, 10, 11, 14, 15);
    rows[4 + j] = (u16)__builtin_shufflevector(high, high2, 0, 1, 4, 5, 8, 9, 12, 13);
    rows[12 + j] = (u16)__builtin_shufflevector(high, high2, 2, 3, 6, 7, 10, 11, 14, 15);
  }
}

// Two lines of pairs.
inline void interleave(const u16& first, const u16& second, u16* lines) {
  const h32 a = (h32)first, b = (h32)second;
  lines[0] = (u16)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                          11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
  lines[1] = (u16)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57,
                                          26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}
#else
inline void transpose(u16* rows) {
  uint32_t words[16][16], columns[16][16];
  memcpy(words, rows, sizeof words);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) columns[j][i] = words[i][j];
  memcpy(rows, columns, sizeof columns);
}

inline void interleave(const u16& first, const u16& second, u16* lines) {
  uint16_t a[32], b[32];
  uint32_t words[32];
  memcpy(a, &first, sizeof a);
  memcpy(b, &second, sizeof b);
  for (int i = 0; i < 32; ++i) words[i] = a[i] | (uint32_t)b[i] << 16;
  memcpy(lines, words, sizeof words);
}
#endif

// 64 bytes of a position, or of two (null: not there) as pairs: lines of what `step` multiplies with.
inline void value_lines(const float* const* at, int from, int count, u16* lines) {
  lines[0] = at[0] ? load_words(at[0] + from, count) : u16{};
}
inline void value_lines(const bf16* const* at, int from, int count, u16* lines) {
  interleave(at[0] ? load_words(at[0] + from, count) : u16{}, at[1] ? load_words(at[1] + from, count) : u16{}, lines);
}

// 16 shares as `step` takes them: bf16 pairs are rounded, in place.
template <class X> inline const X* factors(v16& shares) {
#if defined(__AVX512BF16__)
  if (std::is_same<X, pairs>::value) store16((bf16*)&shares, shares);
#endif
  return (const X*)&shares;
}

// DIM: size of a head, 0 where known only at run time. q, out: one (group, dim) per row, `q_step` and `out_step` elements
// apart. Positions come in blocks of 16, laid out like packed weights (a step is an element of the keys, a position of the
// values, or a pair in bf16); a block that lies within the prefix is laid out once for all rows. A query's sums run over
// steps and blocks in one order, whatever is beside it; missing positions are zeros of weight 0.
template <class T, class X, int DIM> class Attend {
  static constexpr int EACH = 4 / sizeof(T), MOST = DIM ? DIM : 16 * MAX_VECTORS;  // elements of a step; of a head
  static constexpr int KEY_LINES = (MOST / EACH + 15) / 16 * 16, VALUE_LINES = 16 / EACH * ((MOST + 31) / 32 * 2);
  const Run<T>& run_;
  const int group_, dim_, shared_;
  int widest_ = 0;
  X* queries_;
  v16 *sums_, *scores_;

  int dim() const { return DIM ? DIM : dim_; }
  int steps() const { return (dim() + 2 * EACH - 1) / (2 * EACH) * 2; }
  int vectors() const { return (dim() + 16 * EACH - 1) / (16 * EACH) * EACH; }
  int padded(int r) const { return (run_.counts[r] + 15) / 16; }
  v16* scores(int query) const { return scores_ + (size_t)query * widest_; }

  // Where a block's positions are, null where there are none.
  void find(const T* from, int r, int b, const T** at) const {
    if (b < shared_) {
      const T* p = from + b * 16 * run_.stride;
      for (int i = 0; i < 16; ++i, p += run_.stride) {
        at[i] = p;
        for (int line = 0; line < dim(); line += 64 / sizeof(T)) __builtin_prefetch(p + 32 * run_.stride + line);
      }
      return;
    }
    for (int i = 0, position = b * 16; i < 16; ++i, ++position)
      at[i] = position < run_.counts[r] ? from + run_.at(r, position) : nullptr;
  }

  // load(address of each position), then use(first query, how many), for each block of each row.
  template <class Load, class Use> void over_blocks(const T* from, const Load& load, const Use& use) const {
    const T* at[16];
    for (int b = 0; b < shared_; ++b) {
      find(from, 0, b, at);
      load(at);
      use(0, run_.rows * group_, b);
    }
    for (int r = 0; r < run_.rows; ++r)
      for (int b = shared_; b < padded(r); ++b) {
        find(from, r, b, at);
        load(at);
        use(r * group_, group_, b);
      }
  }

 public:
  Attend(const Run<T>& run, int group, int dim) : run_(run), group_(group), dim_(dim), shared_(run.prefix / 16) {
    for (int r = 0; r < run.rows; ++r) widest_ = padded(r) > widest_ ? padded(r) : widest_;
  }

  void operator()(const T* q, size_t q_step, T* out, size_t out_step, float scale) {
    static thread_local std::vector<v16> buffer;
    static thread_local std::vector<X> staged;
    const int num = run_.rows * group_, query_vectors = (steps() * sizeof(X) + 63) / 64;
    buffer.resize((size_t)num * (query_vectors + vectors() + widest_));
    queries_ = (X*)buffer.data();
    sums_ = buffer.data() + (size_t)num * query_vectors;
    scores_ = sums_ + (size_t)num * vectors();
    std::fill_n(buffer.data(), (size_t)num * query_vectors, v16{});
    for (int query = 0; query < num; ++query) {
      const T* from = q + query / group_ * q_step + query % group_ * dim();
      memcpy(queries_ + query * steps(), stage(from, 1, dim(), staged), (dim() + EACH - 1) / EACH * sizeof(X));
      for (int v = 0; v < vectors(); ++v) sums_[query * vectors() + v] = v16{};
    }
    multiply_keys(scale);
    for (int query = 0; query < num; ++query) softmax(scores(query), run_.counts[query / group_]);
    mix_values();
    for (int query = 0; query < num; ++query)
      for (int v = 0; v < vectors(); ++v)
        store_part(out + query / group_ * out_step + query % group_ * dim() + v * 16, sums_[query * vectors() + v],
                   dim() - v * 16);
  }

 private:
  // Scores of COUNT queries, from `query` on. None of the sums waits for another.
  template <int COUNT> void score(const u16* keys, int query, int b, float scale) const {
    v16 sums[COUNT][2] = {};
    const X* queries = queries_ + query * steps();
    for (int s = 0; s < steps(); s += 2)
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i)
          sums[i][odd] = step((const T*)(keys + s + odd), queries + i * steps() + s + odd, sums[i][odd]);
    for (int i = 0; i < COUNT; ++i) scores(query + i)[b] = (sums[i][0] + sums[i][1]) * splat(scale);
  }

  void multiply_keys(float scale) const {
    u16 keys[KEY_LINES];
    over_blocks(
        run_.keys,
        [&](const T** at) {
          for (int first = 0; first < steps(); first += 16) {
            for (int i = 0; i < 16; ++i)
              keys[first + i] = at[i] ? load_words(at[i] + first * EACH, dim() - first * EACH) : u16{};
            transpose(keys + first);
          }
        },
        [&](int query, int count, int b) {
          for (; count >= SCORED; count -= SCORED, query += SCORED) score<SCORED>(keys, query, b, scale);
          for (; count >= SCORED / 2; count -= SCORED / 2, query += SCORED / 2) score<SCORED / 2>(keys, query, b, scale);
          for (; count > 0; --count, ++query) score<1>(keys, query, b, scale);
        });
  }

  // COUNT queries' sums, from `query` on, go on with a block's values.
  template <int COUNT> void mix(const u16* values, int query, int b) const {
    const X* shares[COUNT];
    v16 mixed[COUNT][DIM ? DIM / 16 : MAX_VECTORS];
    for (int i = 0; i < COUNT; ++i) {
      shares[i] = factors<X>(scores(query + i)[b]);
      for (int v = 0; v < vectors(); ++v) mixed[i][v] = sums_[(query + i) * vectors() + v];
    }
    for (int s = 0; s < 16 / EACH; ++s)
      for (int v = 0; v < vectors(); ++v)
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; ++i)
          mixed[i][v] = step((const T*)(values + s * vectors() + v), shares[i] + s, mixed[i][v]);
    for (int i = 0; i < COUNT; ++i)
      for (int v = 0; v < vectors(); ++v) sums_[(query + i) * vectors() + v] = mixed[i][v];
  }

  void mix_values() const {
    u16 values[VALUE_LINES];
    over_blocks(
        run_.values,
        [&](const T** at) {
          for (int s = 0; s < 16 / EACH; ++s)
            for (int v = 0; v < vectors(); v += EACH)
              value_lines(at + s * EACH, v * 16, dim() - v * 16, values + s * vectors() + v);
        },
        [&](int query, int count, int b) {
          for (; count >= MIXED; count -= MIXED, query += MIXED) mix<MIXED>(values, query, b);
          for (; count > 0; --count, ++query) mix<1>(values, query, b);
        });
  }
};

template <class T, class X>
void attend(const Run<T>& run, const T* q, size_t q_step, T* out, size_t out_step, int group, int dim, float scale) {
  if (dim == 64) Attend<T, X, 64>(run, group, dim)(q, q_step, out, out_step, scale);
  else if (dim == 128) Attend<T, X, 128>(run, group, dim)(q, q_step, out, out_step, scale);
  else Attend<T, X, 0>(run, group, dim)(q, q_step, out, out_step, scale);
}

}  // namespace
