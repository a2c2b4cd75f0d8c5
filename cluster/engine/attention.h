// Attention of a tree's rows over their slots' prefixes and their own ancestors.
#pragma once
#include <cmath>
#include <vector>

#include "simd.h"

namespace {

// Lane i is the sum of parts[i], added in the same order for every i.
inline v16 sum_each(v16* parts) {
  for (int count = 8; count > 0; count /= 2)
    for (int i = 0; i < count; ++i) {
      v16 a = parts[2 * i], b = parts[2 * i + 1];
      parts[i] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                 __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
  return parts[0];
}

constexpr int MAX_VECTORS = 32, RUN = 4;

// In place over `count` scores, padded to whole vectors with zeros.
inline void softmax(v16* scores, int count) {
  const int padded = (count + 15) / 16;
  v16 tops = splat(-INFINITY), total = {};
  for (int i = count; i < padded * 16; ++i) scores[padded - 1][i % 16] = -INFINITY;
  for (int b = 0; b < padded; ++b) tops = scores[b] > tops ? scores[b] : tops;
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

// V: vectors of 16 that hold a head, 0 where known only at run time. q, out: one (group, dim) per row, `step` elements
// apart. Keys and values are widened to fp32 in blocks of 16 positions, once for all queries that see the block: blocks
// that lie within the prefix are every row's. A query's sums run over its blocks in order, whatever rows are beside it;
// missing positions are zeros of weight 0.
template <class T, int V> void attend(const Run<T>& run, const T* q, size_t q_step, T* out, size_t out_step, int group, int dim, float scale) {
  static thread_local std::vector<v16> buffer;
  const int vectors = V ? V : (dim + 15) / 16, shared = run.prefix / 16;
  int padded[RUN], widest = 0;
  for (int r = 0; r < run.rows; ++r) {
    padded[r] = (run.counts[r] + 15) / 16;
    widest = padded[r] > widest ? padded[r] : widest;
  }
  const size_t queries_size = (size_t)run.rows * group * vectors;
  buffer.resize(2 * queries_size + (size_t)run.rows * group * widest);
  v16 *queries = buffer.data(), *sums = queries + queries_size, *weights = sums + queries_size;
  v16 block[16 * (V ? V : MAX_VECTORS)];
  auto query = [&](int r, int g) { return queries + (size_t)(r * group + g) * vectors; };
  auto sum = [&](int r, int g) { return sums + (size_t)(r * group + g) * vectors; };
  auto scores = [&](int r, int g) { return weights + (size_t)(r * group + g) * widest; };
  auto widen = [&](const T* from, int r, int first) {
    for (int i = 0; i < 16; ++i)
      for (int v = 0; v < vectors; ++v)
        block[i * vectors + v] =
            first + i < run.counts[r] ? load_part(from + run.at(r, first + i) + v * 16, dim - v * 16) : v16{};
  };
  auto score = [&](int r, int b) {
    for (int g = 0; g < group; ++g) {
      v16 parts[16] = {};
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        for (int v = 0; v < vectors; ++v) parts[i] = fma16(query(r, g)[v], block[i * vectors + v], parts[i]);
      scores(r, g)[b] = sum_each(parts) * splat(scale);
    }
  };
  auto mix = [&](int r, int b) {
    for (int g = 0; g < group; ++g) {
      const v16 shares = scores(r, g)[b];
      v16 mixed[V ? V : MAX_VECTORS];
      for (int v = 0; v < vectors; ++v) mixed[v] = sum(r, g)[v];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        for (int v = 0; v < vectors; ++v) mixed[v] = fma16(splat(shares[i]), block[i * vectors + v], mixed[v]);
      for (int v = 0; v < vectors; ++v) sum(r, g)[v] = mixed[v];
    }
  };
  auto over_blocks = [&](const T* from, auto&& visit) {
    for (int b = 0; b < shared; ++b) {
      widen(from, 0, b * 16);
      for (int r = 0; r < run.rows; ++r) visit(r, b);
    }
    for (int r = 0; r < run.rows; ++r)
      for (int b = shared; b < padded[r]; ++b) {
        widen(from, r, b * 16);
        visit(r, b);
      }
  };
  for (int r = 0; r < run.rows; ++r)
    for (int g = 0; g < group; ++g)
      for (int v = 0; v < vectors; ++v) {
        query(r, g)[v] = load_part(q + r * q_step + g * dim + v * 16, dim - v * 16);
        sum(r, g)[v] = v16{};
      }
  over_blocks(run.keys, score);
  for (int r = 0; r < run.rows; ++r)
    for (int g = 0; g < group; ++g) softmax(scores(r, g), run.counts[r]);
  over_blocks(run.values, mix);
  for (int r = 0; r < run.rows; ++r)
    for (int g = 0; g < group; ++g)
      for (int v = 0; v < vectors; ++v) store_part(out + r * out_step + g * dim + v * 16, sum(r, g)[v], dim - v * 16);
}

}  // namespace
