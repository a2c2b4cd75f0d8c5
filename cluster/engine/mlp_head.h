// The network that guesses on from a target's hidden states; drafters/mlp_head.py says what it computes and why.
#pragma once
#include <cstring>
#include <vector>

#include "linear.h"
#include "norm.h"

namespace {

template <class T> struct MlpBlock {
  const T* norm;
  Matrix<T> gate_up, down;
};

template <class T> struct MlpHead {
  const T *embedding, *state_norm, *token_norm;
  Matrix<T> mix;
  const MlpBlock<T>* blocks;
  const T* final_norm;
  Matrix<T> head;
  int32_t num_blocks, hidden, inner, head_size;
  float eps;
};

template <class T, class X>
void advance(const MlpHead<T>& head, const int64_t* tokens, const T* states, T* next, int rows, int threads) {
  static thread_local std::vector<T> both, normed, inner;
  const int hidden = head.hidden;
  both.resize((size_t)rows * 2 * hidden);
  normed.resize((size_t)rows * hidden);
  inner.resize((size_t)rows * head.inner);
  for (int r = 0; r < rows; ++r) {
    T* row = both.data() + (size_t)r * 2 * hidden;
    norm_row(states + (size_t)r * hidden, head.state_norm, row, hidden, head.eps);
    norm_row(head.embedding + (size_t)tokens[r] * hidden, head.token_norm, row + hidden, hidden, head.eps);
  }
  multiply<T, X>(both.data(), rows, 2 * hidden, head.mix, nullptr, next, hidden, false, false, threads);
  for (int b = 0; b < head.num_blocks; ++b) {
    const MlpBlock<T>& block = head.blocks[b];
    for (int r = 0; r < rows; ++r) norm_row(next + (size_t)r * hidden, block.norm, normed.data() + (size_t)r * hidden, hidden, head.eps);
    multiply<T, X>(normed.data(), rows, hidden, block.gate_up, nullptr, inner.data(), head.inner, false, true, threads);
    multiply<T, X>(inner.data(), rows, head.inner, block.down, next, next, hidden, false, false, threads);
  }
}

template <class T, class X> void head_logits(const MlpHead<T>& head, const T* states, float* logits, int rows, int threads) {
  static thread_local std::vector<T> normed;
  const int hidden = head.hidden;
  normed.resize((size_t)rows * hidden);
  for (int r = 0; r < rows; ++r) norm_row(states + (size_t)r * hidden, head.final_norm, normed.data() + (size_t)r * hidden, hidden, head.eps);
  multiply<T, X>(normed.data(), rows, hidden, head.head, nullptr, logits, head.head_size, true, false, threads);
}

}  // namespace
