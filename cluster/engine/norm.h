// RMS norm of a row.
#pragma once
#include <cmath>

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

}  // namespace
