// RMS norm of a row.
#pragma once
#include <cmath>
#include <vector>

#include "simd.h"

namespace {

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

// Rows of x, each normalised, in this thread's memory until the next call.
template <class T> const T* normed_rows(const T* x, const T* weight, int rows, int width, float eps) {
  static thread_local std::vector<T> normed;
  normed.resize((size_t)rows * width);
  for (int r = 0; r < rows; ++r) norm_row(x + (size_t)r * width, weight, normed.data() + (size_t)r * width, width, eps);
  return normed.data();
}

}  // namespace
