// CPU kernels of the decoder: packed linear, tree attention, norms and rotary embedding, in fp32 and bf16.
//
// Contract: a row's result does not depend on the other rows of the call. Every output element is one chain of fused
// multiply-adds in a fixed order, whatever the register tile; attention sums a row's keys in position order. The file
// is compiled with -ffp-contract=off and fuses only where fma16() says so, so that no template instance can round
// differently from another. bf16 rounds where a stock bf16 model stores a tensor; sums are fp32.
#include <cmath>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace {

// ---- linear: weights packed as [block of 16 outputs][step][64 bytes]; a step is one k in fp32, a pair of k in bf16

// What a thread multiplies weights with: fp32 rows, or bf16 pairs as one 32-bit word where the CPU multiplies those.
#if defined(__AVX512BF16__)
using pairs = uint32_t;
inline v16 step(const bf16* w, const pairs* x, v16 sum) {
  return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32((int)*x));
}
#else
struct pairs { float low, high; };
inline v16 step(const bf16* w, const pairs* x, v16 sum) {
  u16 both;
  memcpy(&both, w, 64);
  return fma16((v16)(both & 0xffff0000u), splat(x->high), fma16((v16)(both << 16), splat(x->low), sum));
}
#endif
inline v16 step(const float* w, const float* x, v16 sum) { return fma16(load16(w), splat(*x), sum); }

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

template <class T, class X> struct Linear {
  const X* x;             // (rows, steps)
  const T* weight;        // (blocks, steps, 64 bytes)
  const float* bias;      // (16 * blocks) or null
  const T* residual;      // (rows, outputs) or null
  void* out;              // (rows, outputs) of T, or of float where wide
  int rows, steps, outputs;
  bool wide, gated;       // gated: blocks alternate gate and up; the output is silu(gate) * up

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

  template <int R, int B> void tile(int row, int block) const {
    const size_t block_size = (size_t)steps * (64 / sizeof(T));
    const T* w = weight + block * block_size;
    const X* first = x + (size_t)row * steps;
    v16 sums[R][B] = {};
    for (int s = 0; s < steps; ++s)
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          sums[r][b] = step(w + b * block_size + (size_t)s * (64 / sizeof(T)), first + (size_t)r * steps + s, sums[r][b]);
    for (int r = 0; r < R; ++r) finish(row + r, block, sums[r], B);
  }

  template <int B> void rows_of(int block) const {
    int row = 0;
    for (; row + 8 <= rows; row += 8) tile<8, B>(row, block);
    switch (rows - row) {
      case 7: return tile<7, B>(row, block);
      case 6: return tile<6, B>(row, block);
      case 5: return tile<5, B>(row, block);
      case 4: return tile<4, B>(row, block);
      case 3: return tile<3, B>(row, block);
      case 2: return tile<2, B>(row, block);
      case 1: return tile<1, B>(row, block);
    }
  }

  void run(int threads) const {
    int units = (blocks() + 1) / 2;
    bool small = (int64_t)steps * units < 4096;
    in_parts(small ? 1 : threads, units, [&](int first, int last) {
      int block = first * 2, end = last * 2 < blocks() ? last * 2 : blocks();
      if (rows <= 4)
        for (; block + 4 <= end; block += 4) rows_of<4>(block);
      for (; block + 2 <= end; block += 2) rows_of<2>(block);
      if (block < end) rows_of<1>(block);
    });
  }
};

template <class T, class X>
void linear(const T* x, int rows, int k, const T* weight, const float* bias, const T* residual, void* out, int outputs,
            int wide, int gated, int threads) {
  static thread_local std::vector<X> buffer;
  int steps = sizeof(T) == 2 ? (k + 1) / 2 : k;
  Linear<T, X>{stage(x, rows, k, buffer), weight, bias, residual, out, rows, steps, outputs, wide != 0, gated != 0}.run(threads);
}

// ---- norm and rotary embedding

template <class T> void norm_row(const T* x, const T* weight, T* out, int width, float eps) {
  v16 squares = {};
  for (int i = 0; i < width; i += 16) {
    v16 part = load_part(x + i, width - i);
    squares = fma16(part, part, squares);
  }
  v16 scale = splat(1.0f / sqrtf(hsum(squares) / width + eps));
  for (int i = 0; i < width; i += 16) {
    v16 unit = round16(load_part(x + i, width - i) * scale, x);
    store_part(out + i, unit * load_part(weight + i, width - i), width - i);
  }
}

template <class T> void norm(const T* x, const T* weight, T* out, int rows, int width, float eps) {
  for (int r = 0; r < rows; ++r) norm_row(x + (size_t)r * width, weight, out + (size_t)r * width, width, eps);
}

template <class T> void rotate(const T* x, const float* cos, const float* sin, T* out, int dim) {
  int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    float a = to_float(x[i]), b = to_float(x[i + half]);
    store(out + i, rounded<T>(a * cos[i]) - rounded<T>(b * sin[i]));
    store(out + i + half, rounded<T>(b * cos[i]) + rounded<T>(a * sin[i]));
  }
}

// Rotates the queries of qkv (rows, heads + 2 * kv_heads, dim) in place; writes keys and values into the cache.
template <class T>
void rope_store(T* qkv, int rows, int heads, int kv_heads, int dim, const T* q_norm, const T* k_norm, float eps,
                const float* cos, const float* sin, const int32_t* positions, const int64_t* cache_rows, T* keys, T* values) {
  for (int r = 0; r < rows; ++r) {
    T* row = qkv + (size_t)r * (heads + 2 * kv_heads) * dim;
    const float *c = cos + (size_t)positions[r] * (dim / 2), *s = sin + (size_t)positions[r] * (dim / 2);
    size_t at = (size_t)cache_rows[r] * kv_heads * dim;
    for (int h = 0; h < heads + kv_heads; ++h) {
      T* x = row + (size_t)h * dim;
      bool query = h < heads;
      if (q_norm) norm_row(x, query ? q_norm : k_norm, x, dim, eps);
      rotate(x, c, s, query ? x : keys + at + (size_t)(h - heads) * dim, dim);
    }
    memcpy(values + at, row + (size_t)(heads + kv_heads) * dim, (size_t)kv_heads * dim * sizeof(T));
  }
}

// ---- tree attention

// The keys of one row and KV head in position order: the committed prefix, then the row's path through the scratch.
template <class T> struct Keys {
  const T *keys, *values;  // position 0 of the slot, at this KV head
  size_t stride;           // elements from one position to the next
  const int32_t* path;
  int prefix, count;
  size_t at(int i) const { return (i < prefix ? i : prefix + path[i - prefix]) * stride; }
};

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

constexpr int MAX_VECTORS = 32;

// V: vectors of 16 that hold a head, 0 where known only at run time. q, out: (group, dim). Keys and values are widened
// to fp32 in blocks of 16 positions, once for the whole group of query heads; missing positions are zeros of weight 0.
template <class T, int V> void attend(const T* q, const Keys<T>& row, int group, int dim, float scale, T* out) {
  static thread_local std::vector<v16> buffer;
  const int vectors = V ? V : (dim + 15) / 16, padded = (row.count + 15) / 16;
  buffer.resize((size_t)group * (padded + 2 * vectors));
  v16 *queries = buffer.data(), *sums = queries + (size_t)group * vectors, *weights = sums + (size_t)group * vectors;
  v16 block[16 * (V ? V : MAX_VECTORS)];
  for (int g = 0; g < group; ++g)
    for (int v = 0; v < vectors; ++v) {
      queries[g * vectors + v] = load_part(q + g * dim + v * 16, dim - v * 16);
      sums[g * vectors + v] = v16{};
    }
  auto widen = [&](const T* from, int first) {
    for (int i = 0; i < 16; ++i)
      for (int v = 0; v < vectors; ++v)
        block[i * vectors + v] =
            first + i < row.count ? load_part(from + row.at(first + i) + v * 16, dim - v * 16) : v16{};
  };
  for (int b = 0; b < padded; ++b) {
    widen(row.keys, b * 16);
    for (int g = 0; g < group; ++g) {
      v16 parts[16] = {};
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        for (int v = 0; v < vectors; ++v) parts[i] = fma16(queries[g * vectors + v], block[i * vectors + v], parts[i]);
      weights[g * padded + b] = sum_each(parts) * splat(scale);
    }
  }
  for (int g = 0; g < group; ++g) {
    v16 *scores = weights + (size_t)g * padded, tops = splat(-INFINITY), total = {};
    for (int i = row.count; i < padded * 16; ++i) scores[padded - 1][i % 16] = -INFINITY;
    for (int b = 0; b < padded; ++b) tops = scores[b] > tops ? scores[b] : tops;
    float top = tops[0];
    for (int i = 1; i < 16; ++i) top = tops[i] > top ? tops[i] : top;
    for (int b = 0; b < padded; ++b) scores[b] = exp16(scores[b] - splat(top));
    for (int i = row.count; i < padded * 16; ++i) scores[padded - 1][i % 16] = 0.0f;
    for (int b = 0; b < padded; ++b) total += scores[b];
    v16 share = splat(1.0f / hsum(total));
    for (int b = 0; b < padded; ++b) scores[b] *= share;
  }
  for (int b = 0; b < padded; ++b) {
    widen(row.values, b * 16);
    for (int g = 0; g < group; ++g) {
      const v16 scores = weights[g * padded + b];
      v16 mixed[V ? V : MAX_VECTORS];
      for (int v = 0; v < vectors; ++v) mixed[v] = sums[g * vectors + v];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        for (int v = 0; v < vectors; ++v) mixed[v] = fma16(splat(scores[i]), block[i * vectors + v], mixed[v]);
      for (int v = 0; v < vectors; ++v) sums[g * vectors + v] = mixed[v];
    }
  }
  for (int g = 0; g < group; ++g)
    for (int v = 0; v < vectors; ++v) store_part(out + g * dim + v * 16, sums[g * vectors + v], dim - v * 16);
}

// paths: (rows, path_width) scratch indices, root first, the row itself last; slots, prefixes, depths: (rows).
template <class T>
void attention(const T* qkv, const T* keys, const T* values, T* out, int rows, int heads, int kv_heads, int dim,
               int64_t slot_size, const int32_t* slots, const int32_t* prefixes, const int32_t* paths, int path_width,
               const int32_t* path_lengths, float scale, int threads) {
  int group = heads / kv_heads;
  in_parts(rows * kv_heads * dim < 128 ? 1 : threads, rows * kv_heads, [&](int first, int last) {
    for (int item = first; item < last; ++item) {
      int r = item / kv_heads, h = item % kv_heads;
      size_t slot = (size_t)slots[r] * slot_size * kv_heads * dim + (size_t)h * dim;
      Keys<T> row{keys + slot, values + slot, (size_t)kv_heads * dim, paths + (size_t)r * path_width,
                  prefixes[r], prefixes[r] + path_lengths[r]};
      const T* q = qkv + ((size_t)r * (heads + 2 * kv_heads) + (size_t)h * group) * dim;
      T* result = out + ((size_t)r * heads + (size_t)h * group) * dim;
      if (dim == 64) attend<T, 4>(q, row, group, dim, scale, result);
      else if (dim == 128) attend<T, 8>(q, row, group, dim, scale, result);
      else attend<T, 0>(q, row, group, dim, scale, result);
    }
  });
}

}  // namespace

#define EXPORT(T, X, suffix)                                                                                              \
  extern "C" void linear_##suffix(const T* x, int rows, int k, const T* weight, const float* bias, const T* residual,    \
                                  void* out, int outputs, int wide, int gated, int threads) {                            \
    linear<T, X>(x, rows, k, weight, bias, residual, out, outputs, wide, gated, threads);                                \
  }                                                                                                                       \
  extern "C" void norm_##suffix(const T* x, const T* weight, T* out, int rows, int width, float eps) {                    \
    norm(x, weight, out, rows, width, eps);                                                                               \
  }                                                                                                                       \
  extern "C" void rope_store_##suffix(T* qkv, int rows, int heads, int kv_heads, int dim, const T* q_norm,                \
                                      const T* k_norm, float eps, const float* cos, const float* sin,                     \
                                      const int32_t* positions, const int64_t* cache_rows, T* keys, T* values) {          \
    rope_store(qkv, rows, heads, kv_heads, dim, q_norm, k_norm, eps, cos, sin, positions, cache_rows, keys, values);      \
  }                                                                                                                       \
  extern "C" void attention_##suffix(const T* qkv, const T* keys, const T* values, T* out, int rows, int heads,           \
                                     int kv_heads, int dim, int64_t slot_size, const int32_t* slots,                     \
                                     const int32_t* prefixes, const int32_t* paths, int path_width,                       \
                                     const int32_t* path_lengths, float scale, int threads) {                            \
    attention(qkv, keys, values, out, rows, heads, kv_heads, dim, slot_size, slots, prefixes, paths, path_width,          \
              path_lengths, scale, threads);                                                                              \
  }

EXPORT(float, float, f32)
EXPORT(bf16, pairs, bf16)
