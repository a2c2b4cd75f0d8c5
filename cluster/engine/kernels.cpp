// The decoder's forward pass on a CPU, in fp32 and bf16: one call computes a whole step, or one sub-layer of a rank.
//
// Contract: a row's result does not depend on the other rows of the call. Every output element is a sum of
// fused multiply-adds in a fixed order, whatever the register tile; attention sums a row's keys in position order. The
// file is compiled with -ffp-contract=off and fuses only where fma16() and step() say so, so that no template instance can
// round differently from another. bf16 rounds where a stock bf16 model stores a tensor; sums are fp32.
#include "attention.h"
#include "linear.h"
#include "mlp_head.h"
#include "norm.h"

namespace {

// ---- what Python hands over; kernels_native.py mirrors these structures

template <class T> struct Layer {
  const T* input_norm;
  Matrix<T> qkv;
  const T *q_norm, *k_norm;  // null but in Qwen3
  Matrix<T> out;
  const T* mlp_norm;
  Matrix<T> gate_up, down;
};

template <class T> struct Model {
  const T *embedding, *masks;  // masks: of tokens from vocab on, in a drafter's view
  const Layer<T>* layers;
  const T* final_norm;
  Matrix<T> head;
  const float *cos, *sin;  // (positions, dim / 2)
  int32_t num_layers, hidden, inner, heads, kv_heads, dim, vocab, head_size;
  float eps;
};

// rows.py says what these are; cache: (layers, 2, slots * slot_size, kv_heads, dim); wanted: rows that want logits.
template <class T> struct Step {
  const int64_t* tokens;
  const int32_t *slots, *prefixes, *positions;
  const int64_t* cache_rows;
  const int32_t *paths, *path_lengths;
  const int64_t* wanted;
  T *cache, *features;  // features: (num_wanted, hidden), where the final norm's rows go, or null
  int64_t slot_size, num_positions;
  int32_t rows, path_width, num_wanted;
};

// ---- rotary embedding

template <class T> void rotate(const T* x, const float* cos, const float* sin, T* out, int dim) {
  int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    float a = to_float(x[i]), b = to_float(x[i + half]);
    store(out + i, rounded<T>(a * cos[i]) - rounded<T>(b * sin[i]));
    store(out + i + half, rounded<T>(b * cos[i]) + rounded<T>(a * sin[i]));
  }
}

// Of row r of qkv (rows, heads + 2 * kv_heads, dim): queries, rotated, into `queries`; keys and values into the cache.
template <class T>
void rope_store(const T* qkv, T* queries, const Model<T>& model, const Layer<T>& layer, const Step<T>& step, T* keys, T* values, int r) {
  static thread_local std::vector<T> normed;
  const int dim = model.dim, heads = model.heads, kv_heads = model.kv_heads;
  normed.resize(dim);
  const T* row = qkv + (size_t)r * (heads + 2 * kv_heads) * dim;
  const size_t table = (size_t)step.positions[r] * (dim / 2), at = (size_t)step.cache_rows[r] * kv_heads * dim;
  queries += (size_t)r * heads * dim;
  for (int h = 0; h < heads + kv_heads; ++h) {
    const T* x = row + (size_t)h * dim;
    bool query = h < heads;
    if (layer.q_norm) {
      norm_row(x, query ? layer.q_norm : layer.k_norm, normed.data(), dim, model.eps);
      x = normed.data();
    }
    T* out = query ? queries + (size_t)h * dim : keys + at + (size_t)(h - heads) * dim;
    rotate(x, model.cos + table, model.sin + table, out, dim);
  }
  memcpy(values + at, row + (size_t)(heads + kv_heads) * dim, (size_t)kv_heads * dim * sizeof(T));
}

// ---- the forward pass

// Up to so many rows operations may be repeated, for which each has memory of its own to write to. More rows are bound by
// arithmetic, where a late thread matters less, and would need much memory: there all layers share it.
constexpr int REPEATABLE_ROWS = 16;

// Where a layer's results go: (rows, width) each.
template <class T> struct Results {
  T *qkv, *queries, *mixed, *middle, *inner, *end;

  static size_t widths(const Model<T>& model) {
    return (size_t)(3 * model.heads + 2 * model.kv_heads) * model.dim + 2 * model.hidden + model.inner;
  }

  Results(const Model<T>& model, size_t rows, T* memory) {
    qkv = memory;
    queries = qkv + rows * (model.heads + 2 * model.kv_heads) * model.dim;
    mixed = queries + rows * model.heads * model.dim;
    middle = mixed + rows * model.heads * model.dim;
    inner = middle + rows * model.hidden;
    end = inner + rows * model.inner;
  }
};

// What one thread of a call has. All of them work on the same memory: the embedded rows, then results.
template <class T, class X> struct Forward {
  const Model<T>& model;
  const Step<T>& step;
  T* memory;
  Walk& walk;

  // body(forward) on every thread, in at most so many operations, with results of so many layers.
  template <class Body>
  static void run(const Model<T>& model, const Step<T>& step, int threads, int operations, int layers, const Body& body) {
    static thread_local std::vector<T> kept;  // from step to step
    const bool repeatable = step.rows <= REPEATABLE_ROWS;
    const size_t size = step.rows * (model.hidden + Results<T>::widths(model) * (repeatable ? layers : 1));
    if (kept.size() < size) kept.resize(size);
    T* start = kept.data();
    Team::shared().run(threads, operations, repeatable, [&](Walk& walk) { body(Forward{model, step, start, walk}); });
  }

  Results<T> results(int layer) const {
    const size_t before = step.rows <= REPEATABLE_ROWS ? layer * Results<T>::widths(model) : 0;
    return {model, (size_t)step.rows, memory + step.rows * (model.hidden + before)};
  }

  template <class Input>
  void linear(const Input& input, int rows, int inputs, Matrix<T> matrix, const T* residual, void* out, int outputs,
              bool wide = false, bool gated = false) const {
    multiply<T, X>(walk, input, rows, inputs, matrix, residual, out, outputs, wide, gated);
  }

  // Row-wise work is too little to share out for a few rows.
  template <class Work> void each_row(int rows, const Work& work) const {
    walk.each(rows, rows < 16 ? 1 : walk.parts(), [&](int first, int last) {
      for (int r = first; r < last; ++r) work(r);
    });
  }

  // Rows of one slot that stand together share the walk over their prefix, as far as that leaves all threads work. A
  // head's runs follow each other: its keys and values are in the cache then.
  void attention(const T* queries, const T* keys, const T* values, T* out) const {
    const int dim = model.dim, kv_heads = model.kv_heads, group = model.heads / kv_heads;
    const int longest = std::min(RUN, (2 * step.rows * kv_heads + walk.parts() - 1) / walk.parts());  // two a thread
    const size_t width = (size_t)model.heads * dim;
    int runs = 0;
    for (int r = 0; r < step.rows; r = end_of_run(r, longest)) ++runs;
    walk.each(
        runs * kv_heads, walk.parts(),
        [&] {
          static thread_local std::vector<int> starts;
          starts.clear();
          for (int r = 0; r < step.rows; r = end_of_run(r, longest)) starts.push_back(r);
          return starts.data();
        },
        [&](const int* starts, int first, int last) {
          for (int item = first; item < last; ++item) {
            const int start = starts[item % runs], h = item / runs;
            const size_t slot = ((size_t)step.slots[start] * step.slot_size * kv_heads + h) * dim;
            Run<T> run{keys + slot, values + slot, (size_t)kv_heads * dim, end_of_run(start, longest) - start, step.prefixes[start], {}, {}};
            for (int r = 0; r < run.rows; ++r) {
              run.paths[r] = step.paths + (size_t)(start + r) * step.path_width;
              run.counts[r] = run.prefix + step.path_lengths[start + r];
            }
            const size_t head = (size_t)start * width + (size_t)h * group * dim;
            attend<T, X>(run, queries + head, width, out + head, width, group, dim, scale());
          }
        });
  }

  int end_of_run(int start, int longest) const {
    int r = start + 1;
    while (r < step.rows && r - start < longest && step.slots[r] == step.slots[start]) ++r;
    return r;
  }

  float scale() const { return (float)(1.0 / sqrt((double)model.dim)); }

  // Rows of x, normalised, for each thread that asks.
  auto normed(const T* x, const T* weight) const {
    return [this, x, weight] { return normed_rows(x, weight, step.rows, model.hidden, model.eps); };
  }

  // One sub-layer of x (rows, hidden): added to residual, or (wide, without one) in fp32. `to`: results on the way.
  void sub_layer(int index, const T* x, const T* residual, const Results<T>& to, void* out, bool wide) const {
    const Layer<T>& layer = model.layers[index / 2];
    const int rows = step.rows, hidden = model.hidden;
    if (index % 2) {
      linear(normed(x, layer.mlp_norm), rows, hidden, layer.gate_up, nullptr, to.inner, model.inner, false, true);
      linear([&] { return to.inner; }, rows, model.inner, layer.down, residual, out, hidden, wide);
      return;
    }
    const int mixed_width = model.heads * model.dim, qkv_width = mixed_width + 2 * model.kv_heads * model.dim;
    const size_t cache_size = (size_t)step.num_positions * model.kv_heads * model.dim;
    T *keys = step.cache + index * cache_size, *values = keys + cache_size;
    linear(normed(x, layer.input_norm), rows, hidden, layer.qkv, nullptr, to.qkv, qkv_width);
    each_row(rows, [&](int r) { rope_store(to.qkv, to.queries, model, layer, step, keys, values, r); });
    attention(to.queries, keys, values, to.mixed);
    linear([&] { return to.mixed; }, rows, mixed_width, layer.out, residual, out, hidden, wide);
  }

  void addend(int index, const T* x, float* out) const { sub_layer(index, x, nullptr, results(0), out, true); }

  void head(const T* x, float* logits) const {
    const int count = step.num_wanted, hidden = model.hidden;
    if (count == 0) return;
    const auto normed = [&] {
      static thread_local std::vector<T> rows;
      rows.resize((size_t)count * hidden);
      for (int i = 0; i < count; ++i)
        norm_row(x + (size_t)step.wanted[i] * hidden, model.final_norm, rows.data() + (size_t)i * hidden, hidden, model.eps);
      if (step.features) memcpy(step.features, rows.data(), (size_t)count * hidden * sizeof(T));
      return rows.data();
    };
    linear(normed, count, hidden, model.head, nullptr, logits, model.head_size, true);
  }

  void all(const uint8_t* skip, float* logits) const {
    const int hidden = model.hidden;
    each_row(step.rows, [&](int r) {
      int64_t token = step.tokens[r];
      const T* row = token < model.vocab ? model.embedding + token * hidden : model.masks + (token - model.vocab) * hidden;
      memcpy(memory + (size_t)r * hidden, row, hidden * sizeof(T));
    });
    const T* x = memory;
    for (int index = 0; index < 2 * model.num_layers; ++index) {
      if (skip[index]) continue;
      const Results<T> to = results(index / 2);
      T* out = index % 2 ? to.end : to.middle;
      sub_layer(index, x, x, to, out, false);
      x = out;
    }
    head(x, logits);
  }
};

template <class T, class X>
void forward(const Model<T>& model, const Step<T>& step, const uint8_t* skip, float* logits, int threads) {
  const int operations = 2 + 6 * model.num_layers;
  Forward<T, X>::run(model, step, threads, operations, model.num_layers, [&](const auto& thread) { thread.all(skip, logits); });
}

template <class T, class X>
void sub_layer(const Model<T>& model, const Step<T>& step, int index, const T* x, float* addend, int threads) {
  Forward<T, X>::run(model, step, threads, 4, 1, [&](const auto& thread) { thread.addend(index, x, addend); });
}

template <class T, class X> void head(const Model<T>& model, const Step<T>& step, const T* x, float* logits, int threads) {
  Forward<T, X>::run(model, step, threads, 1, 0, [&](const auto& thread) { thread.head(x, logits); });
}

}  // namespace

// A whole step. skip: (2 * layers) flags of sub-layers to leave out; logits: (num_wanted, head_size).
extern "C" void forward_f32(const Model<float>* model, const Step<float>* step, const uint8_t* skip, float* logits, int threads) {
  forward<float, float>(*model, *step, skip, logits, threads);
}
extern "C" void forward_bf16(const Model<bf16>* model, const Step<bf16>* step, const uint8_t* skip, float* logits, int threads) {
  forward<bf16, pairs>(*model, *step, skip, logits, threads);
}

// A step of one rank among several, in parts, between which the ranks add up. x: (rows, hidden), not changed.
// sub_layer: this rank's addend to the residual, (rows, hidden); head: the logits of its part of the vocabulary.
extern "C" void sub_layer_f32(const Model<float>* model, const Step<float>* step, int index, const float* x, float* addend, int threads) {
  sub_layer<float, float>(*model, *step, index, x, addend, threads);
}
extern "C" void sub_layer_bf16(const Model<bf16>* model, const Step<bf16>* step, int index, const bf16* x, float* addend, int threads) {
  sub_layer<bf16, pairs>(*model, *step, index, x, addend, threads);
}
extern "C" void head_f32(const Model<float>* model, const Step<float>* step, const float* x, float* logits, int threads) {
  head<float, float>(*model, *step, x, logits, threads);
}
extern "C" void head_bf16(const Model<bf16>* model, const Step<bf16>* step, const bf16* x, float* logits, int threads) {
  head<bf16, pairs>(*model, *step, x, logits, threads);
}

// A step of the network in mlp_head.h, and what follows its states. states, next: (rows, hidden); logits: (rows, head_size).
extern "C" void mlp_advance_f32(const MlpHead<float>* head, const int64_t* tokens, const float* states, float* next, int rows, int threads) {
  advance<float, float>(*head, tokens, states, next, rows, threads);
}
extern "C" void mlp_advance_bf16(const MlpHead<bf16>* head, const int64_t* tokens, const bf16* states, bf16* next, int rows, int threads) {
  advance<bf16, pairs>(*head, tokens, states, next, rows, threads);
}
extern "C" void mlp_logits_f32(const MlpHead<float>* head, const float* states, float* logits, int rows, int threads) {
  head_logits<float, float>(*head, states, logits, rows, threads);
}
extern "C" void mlp_logits_bf16(const MlpHead<bf16>* head, const bf16* states, float* logits, int rows, int threads) {
  head_logits<bf16, pairs>(*head, states, logits, rows, threads);
}

// Whether weights in fewer bits can be multiplied with here, and their making; twelve_bits.h and affine.h have the arguments.
extern "C" int can_decode() { return TWELVE_BIT_WEIGHTS && AFFINE_WEIGHTS; }
extern "C" int encode_affine_bf16(const uint16_t* words, int blocks, int lines, int bits, uint8_t* out) {
#if AFFINE_WEIGHTS
  return bits == 4 ? encode_affine<4>(words, blocks, lines, out) : encode_affine<8>(words, blocks, lines, out);
#else
  return 0;
#endif
}
extern "C" void encode_bf16(const uint16_t* words, int blocks, int steps, const uint8_t* upper, uint8_t* out, Stray* strays, int32_t* starts) {
  encode(words, blocks, steps, upper, out, strays, starts);
}
