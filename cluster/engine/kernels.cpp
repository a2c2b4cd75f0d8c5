// The decoder's forward pass on a CPU, in fp32 and bf16: one call computes a whole step, or one sub-layer of a rank.
//
// Contract: a row's result does not depend on the other rows of the call. Every output element is one chain of fused
// multiply-adds in a fixed order, whatever the register tile; attention sums a row's keys in position order. The file
// is compiled with -ffp-contract=off and fuses only where fma16() says so, so that no template instance can round
// differently from another. bf16 rounds where a stock bf16 model stores a tensor; sums are fp32.
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

// Rotates the queries of qkv (rows, heads + 2 * kv_heads, dim) in place; writes keys and values into the cache.
template <class T>
void rope_store(T* qkv, const Model<T>& model, const Layer<T>& layer, const Step<T>& step, T* keys, T* values, int r) {
  const int dim = model.dim, heads = model.heads, kv_heads = model.kv_heads;
  T* row = qkv + (size_t)r * (heads + 2 * kv_heads) * dim;
  const size_t table = (size_t)step.positions[r] * (dim / 2), at = (size_t)step.cache_rows[r] * kv_heads * dim;
  for (int h = 0; h < heads + kv_heads; ++h) {
    T* x = row + (size_t)h * dim;
    bool query = h < heads;
    if (layer.q_norm) norm_row(x, query ? layer.q_norm : layer.k_norm, x, dim, model.eps);
    rotate(x, model.cos + table, model.sin + table, query ? x : keys + at + (size_t)(h - heads) * dim, dim);
  }
  memcpy(values + at, row + (size_t)(heads + kv_heads) * dim, (size_t)kv_heads * dim * sizeof(T));
}

// ---- the forward pass

template <class T, class X> struct Forward {
  const Model<T>& model;
  const Step<T>& step;
  int threads;

  void linear(const T* x, int rows, int inputs, Matrix<T> matrix, const T* residual, void* out, int outputs,
              bool wide = false, bool gated = false) const {
    multiply<T, X>(x, rows, inputs, matrix, residual, out, outputs, wide, gated, threads);
  }

  // Row-wise work is too little to share out for a few rows.
  template <class Work> void each_row(int rows, const Work& work) const {
    in_parts(rows < 16 ? 1 : threads, rows, [&](int first, int last) {
      for (int r = first; r < last; ++r) work(r);
    });
  }

  void norm(const T* x, const T* weight, T* out) const {
    const int width = model.hidden;
    each_row(step.rows, [&](int r) { norm_row(x + (size_t)r * width, weight, out + (size_t)r * width, width, model.eps); });
  }

  // Rows of one slot that stand together share the walk over their prefix.
  void attention(const T* qkv, const T* keys, const T* values, T* out) const {
    const int dim = model.dim, kv_heads = model.kv_heads, group = model.heads / kv_heads;
    const size_t q_step = (size_t)(model.heads + 2 * kv_heads) * dim, out_step = (size_t)model.heads * dim;
    static thread_local std::vector<int> starts;
    starts.clear();
    for (int r = 0; r < step.rows; ++r)
      if (starts.empty() || r - starts.back() == RUN || step.slots[r] != step.slots[r - 1]) starts.push_back(r);
    const int runs = (int)starts.size();
    starts.push_back(step.rows);
    const int* first_row = starts.data();
    in_parts(threads, runs * kv_heads, [&](int first, int last) {
      for (int item = first; item < last; ++item) {
        const int start = first_row[item / kv_heads], h = item % kv_heads;
        const size_t slot = ((size_t)step.slots[start] * step.slot_size * kv_heads + h) * dim;
        Run<T> run{keys + slot, values + slot, (size_t)kv_heads * dim, first_row[item / kv_heads + 1] - start, step.prefixes[start], {}, {}};
        for (int r = 0; r < run.rows; ++r) {
          run.paths[r] = step.paths + (size_t)(start + r) * step.path_width;
          run.counts[r] = run.prefix + step.path_lengths[start + r];
        }
        const size_t head = (size_t)h * group * dim;
        attend(run, qkv + start * q_step + head, q_step, out + start * out_step + head, out_step, group, dim, scale());
      }
    });
  }

  float scale() const { return (float)(1.0 / sqrt((double)model.dim)); }

  // A buffer of this thread, kept from step to step. Contents are those of its last use.
  T* buffer(int which, int width) const {
    static thread_local std::vector<T> buffers[5];
    size_t size = (size_t)step.rows * width;
    if (buffers[which].size() < size) buffers[which].resize(size);
    return buffers[which].data();
  }
  T* hidden_rows() const { return buffer(0, model.hidden); }
  T* normed_rows() const { return buffer(1, model.hidden); }

  // One sub-layer of x (rows, hidden): added to x in place, or (wide) written alone to `out`, in fp32.
  void sub_layer(int index, T* x, void* out, bool wide) const {
    const Layer<T>& layer = model.layers[index / 2];
    const int rows = step.rows, hidden = model.hidden;
    const T* residual = wide ? nullptr : x;
    T* normed = normed_rows();
    if (index % 2) {
      T* inner = buffer(4, model.inner);
      norm(x, layer.mlp_norm, normed);
      linear(normed, rows, hidden, layer.gate_up, nullptr, inner, model.inner, false, true);
      linear(inner, rows, model.inner, layer.down, residual, out, hidden, wide);
      return;
    }
    const int qkv_width = (model.heads + 2 * model.kv_heads) * model.dim, mixed_width = model.heads * model.dim;
    const size_t cache_size = (size_t)step.num_positions * model.kv_heads * model.dim;
    T *qkv = buffer(2, qkv_width), *mixed = buffer(3, mixed_width);
    T *keys = step.cache + index * cache_size, *values = keys + cache_size;
    norm(x, layer.input_norm, normed);
    linear(normed, rows, hidden, layer.qkv, nullptr, qkv, qkv_width);
    each_row(rows, [&](int r) { rope_store(qkv, model, layer, step, keys, values, r); });
    attention(qkv, keys, values, mixed);
    linear(mixed, rows, mixed_width, layer.out, residual, out, hidden, wide);
  }

  void head(const T* x, float* logits) const {
    if (step.num_wanted == 0) return;
    const int hidden = model.hidden;
    T* normed = normed_rows();
    each_row(step.num_wanted, [&](int i) {
      norm_row(x + (size_t)step.wanted[i] * hidden, model.final_norm, normed + (size_t)i * hidden, hidden, model.eps);
    });
    if (step.features) memcpy(step.features, normed, (size_t)step.num_wanted * hidden * sizeof(T));
    linear(normed, step.num_wanted, hidden, model.head, nullptr, logits, model.head_size, true);
  }

  void run(const uint8_t* skip, float* logits) const {
    const int hidden = model.hidden;
    T* x = hidden_rows();
    for (int r = 0; r < step.rows; ++r) {
      int64_t token = step.tokens[r];
      const T* row = token < model.vocab ? model.embedding + token * hidden : model.masks + (token - model.vocab) * hidden;
      memcpy(x + (size_t)r * hidden, row, hidden * sizeof(T));
    }
    for (int index = 0; index < 2 * model.num_layers; ++index)
      if (!skip[index]) sub_layer(index, x, x, false);
    head(x, logits);
  }
};

}  // namespace

// A whole step. skip: (2 * layers) flags of sub-layers to leave out; logits: (num_wanted, head_size).
extern "C" void forward_f32(const Model<float>* model, const Step<float>* step, const uint8_t* skip, float* logits, int threads) {
  Forward<float, float>{*model, *step, threads}.run(skip, logits);
}
extern "C" void forward_bf16(const Model<bf16>* model, const Step<bf16>* step, const uint8_t* skip, float* logits, int threads) {
  Forward<bf16, pairs>{*model, *step, threads}.run(skip, logits);
}

// A step of one rank among several, in parts, between which the ranks add up. x: (rows, hidden), not changed.
// sub_layer: this rank's addend to the residual, (rows, hidden); head: the logits of its part of the vocabulary.
extern "C" void sub_layer_f32(const Model<float>* model, const Step<float>* step, int index, float* x, float* addend, int threads) {
  Forward<float, float>{*model, *step, threads}.sub_layer(index, x, addend, true);
}
extern "C" void sub_layer_bf16(const Model<bf16>* model, const Step<bf16>* step, int index, bf16* x, float* addend, int threads) {
  Forward<bf16, pairs>{*model, *step, threads}.sub_layer(index, x, addend, true);
}
extern "C" void head_f32(const Model<float>* model, const Step<float>* step, const float* x, float* logits, int threads) {
  Forward<float, float>{*model, *step, threads}.head(x, logits);
}
extern "C" void head_bf16(const Model<bf16>* model, const Step<bf16>* step, const bf16* x, float* logits, int threads) {
  Forward<bf16, pairs>{*model, *step, threads}.head(x, logits);
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
