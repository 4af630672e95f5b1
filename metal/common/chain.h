#pragma once
// "The float32 result": a pre-activation is one chain of fused multiply-adds over ascending coordinates, plus the bias.
// It has the same bits here, on the CPU, and in whatever way the operands come to the thread.

#include "common/lanes.h"

/** The most threads of a threadgroup whose simdgroups or threads work each for themselves. */
constant constexpr uint kMaxThreads = 256;

/** <x, w> by one thread that reads for itself: for few results. */
template <typename T>
METAL_FUNC float chain(const device T* x, const device T* w, uint d) {
  float s = 0.0f;
  for (uint c = 0; c < d; ++c) s = fma(float(x[c]), float(w[c]), s);
  return s;
}

// Many results: a simdgroup reads pieces of 32 rows side by side into threadgroup memory, then every thread goes on
// with the chain of its own row. A piece is 128 bytes of a row, what the memory delivers at once; a row of the tile is
// 4 bytes longer, so that threads that read one column meet no bank twice.
constant constexpr uint kPieceBytes = 128, kTileRowBytes = kPieceBytes + 4;

/** The piece from coordinate c on of the rows that the first `rows` threads name; 0 past d. */
template <typename T, int V>
METAL_FUNC void bring(const device T* base, uint row, uint rows, uint d, uint c, threadgroup T* tile, uint lane) {
  constexpr uint width = kPieceBytes / sizeof(T), stride = kTileRowBytes / sizeof(T);
  constexpr uint across = width / V < kSimd ? width / V : kSimd;  // threads that read one row
  constexpr uint steps = width / (across * V), down = kSimd / across;
  for (uint first = 0; first < kSimd; first += down) {
    uint r = first + lane / across;
    ulong from = ulong(simd_shuffle(row, ushort(r))) * d;
    for (uint step = 0; step < steps; ++step) {
      uint at = (step * across + lane % across) * V;
      Lanes<V> v = Lanes<V>(0.0f);
      if (r < rows && c + at < d) v = load<T, V>(base + from + c + at);
      threadgroup T* to = tile + r * stride + at;
      if constexpr (V == 1) {
        to[0] = T(v);
      } else {
        for (int i = 0; i < V; ++i) to[i] = T(v[i]);
      }
    }
  }
}

/**
 * The chains of N rows of x, of which n are there, with the row of w that each thread names. `tile`, 32 *
 * kTileRowBytes, and `piece`, N * kPieceBytes, are the simdgroup's own.
 */
template <typename T, int V, int N>
METAL_FUNC void chains(const device T* x, uint n, const device T* w, uint row, uint rows, uint d, threadgroup T* tile,
                       threadgroup T* piece, uint lane, thread float* s) {
  constexpr uint width = kPieceBytes / sizeof(T), stride = kTileRowBytes / sizeof(T);
  for (uint t = 0; t < N; ++t) s[t] = 0.0f;
  for (uint c = 0; c < d; c += width) {
    bring<T, V>(w, row, rows, d, c, tile, lane);
    for (uint t = 0; t < n; ++t)
      for (uint i = lane; i < width; i += kSimd) piece[t * width + i] = c + i < d ? x[ulong(t) * d + c + i] : T(0.0f);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    uint end = min(width, d - c);
    for (uint i = 0; i < end; ++i) {
      float a = float(tile[lane * stride + i]);
      for (uint t = 0; t < N; ++t)
        if (t < n) s[t] = fma(float(piece[t * width + i]), a, s[t]);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}
