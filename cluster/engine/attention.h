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

// What a query is multiplied with: 16 widened elements, or 32 of bf16 where the CPU multiplies those.
template <class T> struct Chunk {
  static constexpr int size = 16;
  typedef v16 type;
  static type load(const T* p, int count) { return load_part(p, count); }
  static v16 add_product(type a, type b, v16 sum) { return fma16(a, b, sum); }
};
#if defined(__AVX512BF16__)
template <> struct Chunk<bf16> {
  static constexpr int size = 32;
  typedef h32 type;
  static type load(const bf16* p, int count) {
    type chunk = {};
    memcpy(&chunk, p, count >= 32 ? 64 : count * sizeof(bf16));
    return chunk;
  }
  static v16 add_product(type a, type b, v16 sum) {
    return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// DIM: size of a head, 0 where known only at run time. q, out: one (group, dim) per row, `q_step` and `out_step` elements
// apart. Positions come in blocks of 16; a block that lies within the prefix is loaded once for all rows. A query's
// sums run over its blocks in order, whatever is beside it; missing positions are zeros of weight 0.
template <class T, int DIM> class Attend {
  using C = Chunk<T>;
  static constexpr int MOST = DIM ? DIM : 16 * MAX_VECTORS;
  const Run<T>& run_;
  const int group_, dim_ = DIM, chunks_, vectors_, shared_;
  int widest_ = 0;
  typename C::type* queries_;
  v16 *sums_, *scores_;

  int dim() const { return DIM ? DIM : dim_; }
  int chunks() const { return DIM ? (DIM + C::size - 1) / C::size : chunks_; }
  int vectors() const { return DIM ? (DIM + 15) / 16 : vectors_; }
  int padded(int r) const { return (run_.counts[r] + 15) / 16; }
  v16* scores(int query) const { return scores_ + (size_t)query * widest_; }

  // Calls load(i, address) for the block's positions that are there and miss(i) for the others.
  template <class Load, class Miss> void block(const T* from, int r, int b, const Load& load, const Miss& miss) const {
    const int first = b * 16;
    if (b < shared_) {
      const T* p = from + first * run_.stride;
#pragma GCC unroll 4
      for (int i = 0; i < 16; ++i, p += run_.stride) {
        for (int line = 0; line < dim(); line += 64 / sizeof(T)) __builtin_prefetch(p + 32 * run_.stride + line);
        load(i, p);
      }
    } else {
      for (int i = 0; i < 16; ++i) first + i < run_.counts[r] ? load(i, from + run_.at(r, first + i)) : miss(i);
    }
  }

  template <class Load, class Use> void over_blocks(const Load& load, const Use& use) const {
    for (int b = 0; b < shared_; ++b) {
      load(0, b);
      for (int query = 0; query < run_.rows * group_; ++query) use(query, b);
    }
    for (int r = 0; r < run_.rows; ++r)
      for (int b = shared_; b < padded(r); ++b) {
        load(r, b);
        for (int g = 0; g < group_; ++g) use(r * group_ + g, b);
      }
  }

 public:
  Attend(const Run<T>& run, int group, int dim)
      : run_(run), group_(group), dim_(dim), chunks_((dim + C::size - 1) / C::size), vectors_((dim + 15) / 16),
        shared_(run.prefix / 16) {
    for (int r = 0; r < run.rows; ++r) widest_ = padded(r) > widest_ ? padded(r) : widest_;
  }

  void operator()(const T* q, size_t q_step, T* out, size_t out_step, float scale) {
    static thread_local std::vector<v16> buffer;
    const int num = run_.rows * group_;
    buffer.resize((size_t)num * (chunks() + vectors() + widest_));
    queries_ = (typename C::type*)buffer.data();
    sums_ = buffer.data() + (size_t)num * chunks();
    scores_ = sums_ + (size_t)num * vectors();
    for (int query = 0; query < num; ++query) {
      const T* from = q + query / group_ * q_step + query % group_ * dim();
      for (int c = 0; c < chunks(); ++c) queries_[query * chunks() + c] = C::load(from + c * C::size, dim() - c * C::size);
      for (int v = 0; v < vectors(); ++v) sums_[query * vectors() + v] = v16{};
    }
    multiply_keys(scale);
    for (int query = 0; query < num; ++query) softmax(scores(query), run_.counts[query / group_]);
    mix_values();
    for (int query = 0; query < num; ++query)
      for (int v = 0; v < vectors(); ++v)
        store_part(out + query / group_ * out_step + query % group_ * dim() + v * 16, sums_[query * vectors() + v], dim() - v * 16);
  }

 private:
  void multiply_keys(float scale) const {
    typename C::type keys[16 * ((MOST + C::size - 1) / C::size)];
    over_blocks(
        [&](int r, int b) {
          block(run_.keys, r, b,
                [&](int i, const T* p) { for (int c = 0; c < chunks(); ++c) keys[i * chunks() + c] = C::load(p + c * C::size, dim() - c * C::size); },
                [&](int i) { for (int c = 0; c < chunks(); ++c) keys[i * chunks() + c] = typename C::type{}; });
        },
        [&](int query, int b) {
          v16 parts[16] = {};
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i)
            for (int c = 0; c < chunks(); ++c)
              parts[i] = C::add_product(queries_[query * chunks() + c], keys[i * chunks() + c], parts[i]);
          scores(query)[b] = sum_each(parts) * splat(scale);
        });
  }

  void mix_values() const {
    v16 values[16 * ((MOST + 15) / 16)];
    over_blocks(
        [&](int r, int b) {
          block(run_.values, r, b,
                [&](int i, const T* p) { for (int v = 0; v < vectors(); ++v) values[i * vectors() + v] = load_part(p + v * 16, dim() - v * 16); },
                [&](int i) { for (int v = 0; v < vectors(); ++v) values[i * vectors() + v] = v16{}; });
        },
        [&](int query, int b) {
          const float* shares = (const float*)(scores(query) + b);
          v16 mixed[(MOST + 15) / 16];
          for (int v = 0; v < vectors(); ++v) mixed[v] = sums_[query * vectors() + v];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i)
            for (int v = 0; v < vectors(); ++v) mixed[v] = fma16(splat(shares[i]), values[i * vectors() + v], mixed[v]);
          for (int v = 0; v < vectors(); ++v) sums_[query * vectors() + v] = mixed[v];
        });
  }
};

template <class T>
void attend(const Run<T>& run, const T* q, size_t q_step, T* out, size_t out_step, int group, int dim, float scale) {
  if (dim == 64) Attend<T, 64>(run, group, dim)(q, q_step, out, out_step, scale);
  else if (dim == 128) Attend<T, 128>(run, group, dim)(q, q_step, out, out_step, scale);
  else Attend<T, 0>(run, group, dim)(q, q_step, out, out_step, scale);
}

}  // namespace
