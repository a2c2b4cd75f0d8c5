// The network that guesses on from a target's hidden states; drafters/mlp_head.py says what it computes and why.
#pragma once
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
  static thread_local std::vector<T> memory;
  const int hidden = head.hidden;
  memory.resize((size_t)rows * head.inner);
  T* inner = memory.data();
  Team::shared().run(threads, 1 + 2 * head.num_blocks, false, [&](Walk& walk) {
    const auto pairs_of_rows = [&] {
      static thread_local std::vector<T> both;
      both.resize((size_t)rows * 2 * hidden);
      for (int r = 0; r < rows; ++r) {
        T* row = both.data() + (size_t)r * 2 * hidden;
        norm_row(states + (size_t)r * hidden, head.state_norm, row, hidden, head.eps);
        norm_row(head.embedding + (size_t)tokens[r] * hidden, head.token_norm, row + hidden, hidden, head.eps);
      }
      return both.data();
    };
    multiply<T, X>(walk, pairs_of_rows, rows, 2 * hidden, head.mix, nullptr, next, hidden, false, false);
    for (int b = 0; b < head.num_blocks; ++b) {
      const MlpBlock<T>& block = head.blocks[b];
      const auto normed = [&] { return normed_rows(next, block.norm, rows, hidden, head.eps); };
      multiply<T, X>(walk, normed, rows, hidden, block.gate_up, nullptr, inner, head.inner, false, true);
      multiply<T, X>(walk, [&] { return inner; }, rows, head.inner, block.down, next, next, hidden, false, false);
    }
  });
}

template <class T, class X> void head_logits(const MlpHead<T>& head, const T* states, float* logits, int rows, int threads) {
  const auto normed = [&] { return normed_rows(states, head.final_norm, rows, head.hidden, head.eps); };
  Team::shared().run(threads, 1, false, [&](Walk& walk) {
    multiply<T, X>(walk, normed, rows, head.hidden, head.head, nullptr, logits, head.head_size, true, false);
  });
}

}  // namespace
