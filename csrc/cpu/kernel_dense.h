#pragma once
// Products with codes that use few features often, taken as dense ones (cpu/dense.h). Columns lie in the lanes: one
// factor is packed to panels of kPanel columns, [panel][depth][kPanel], the other is read as it is, one float for all
// lanes. An element is one chain of fused multiply-adds over ascending depth that goes on from what the result holds,
// as the sparse walks add, so that only zeros are added beside what they add.

#include "cpu/kernel_encode.h"

namespace mlxsae::cpu::MLXSAE_ISA {

constexpr int kPanel = kTileVectors * kLanes;
constexpr int64_t kProductDepth = 1024;  // a panel of it stays in the second-level cache

/** M rows x one panel. Not inlined: it needs all registers. */
template <int M>
__attribute__((noinline)) void product_tile(const float* const* a, const float* panel, int64_t depth, float* c,
                                            int64_t ldc, const float* const* ahead) {
  constexpr int NV = kTileVectors;
  vf acc[M][NV];
  MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = load(c + i * ldc + v * kLanes);
  }
  const float* row[M];
  MLXSAE_UNROLL for (int i = 0; i < M; ++i) row[i] = a[i];
  auto multiply_add = [&](int64_t k) __attribute__((always_inline)) {
    vf b[NV];
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) b[v] = load(panel + k * kPanel + v * kLanes);
    MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
      vf s = splat(row[i][k]);
      MLXSAE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] += s * b[v];
    }
  };
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    if (ahead) {
      MLXSAE_UNROLL for (int i = 0; i < M; ++i) prefetch(ahead[i] + k);
    }
    _Pragma("GCC unroll 4") for (int q = 0; q < 16; ++q) multiply_add(k + q);
  }
  for (; k < depth; ++k) multiply_add(k);
  MLXSAE_UNROLL for (int i = 0; i < M; ++i) {
    MLXSAE_UNROLL for (int v = 0; v < NV; ++v) store(c + i * ldc + v * kLanes, acc[i][v]);
  }
}

/** c += a b over the rows [i0, i1) and the panel p (Product in kernels.h). */
inline void product(const Product& m, int64_t i0, int64_t i1, int64_t p) {
  constexpr int M = kTileFeatures;
  int64_t columns = m.columns - p * kPanel < kPanel ? m.columns - p * kPanel : kPanel;
  auto row = [&](int64_t i) { return m.a + (m.which ? int64_t(m.which[i]) : i) * m.lda; };
  for (int64_t k0 = 0; k0 < m.depth; k0 += kProductDepth) {
    int64_t depth = m.depth - k0 < kProductDepth ? m.depth - k0 : kProductDepth;
    const float* panel = m.panels + (p * m.depth + k0) * kPanel;
    for (int64_t i = i0; i < i1; i += M) {
      int64_t rows = i1 - i < M ? i1 - i : M;
      const float *a[M], *next[M];
      for (int q = 0; q < M; ++q) {
        a[q] = row(q < rows ? i + q : i) + k0;
        next[q] = i + M + q < i1 ? row(i + M + q) + k0 : a[0];
      }
      float* c = m.c + i * m.ldc + p * kPanel;
      for (int64_t q = M; q < 2 * M && i + q < i1; ++q)  // the next tile begins by reading what it adds to
        for (int64_t l = 0; l < columns; l += 16) prefetch(c + q * m.ldc + l);
      float edge[M * kPanel];
      int64_t ldc = m.ldc;
      bool whole = columns == kPanel;
      if (!whole) {
        std::memset(edge, 0, sizeof(edge));
        for (int64_t q = 0; q < rows; ++q) std::memcpy(edge + q * kPanel, c + q * ldc, columns * sizeof(float));
        c = edge, ldc = kPanel;
      }
      if (rows == M)
        product_tile<M>(a, panel, depth, c, ldc, i + M < i1 ? next : nullptr);
      else
        for (int64_t q = 0; q < rows; ++q) product_tile<1>(a + q, panel, depth, c + q * ldc, ldc, nullptr);
      if (!whole)
        for (int64_t q = 0; q < rows; ++q)
          std::memcpy(m.c + (i + q) * m.ldc + p * kPanel, edge + q * kPanel, columns * sizeof(float));
    }
  }
}

/** Panel p of the rows [0, n), or of those that `which` names: out[p][i][c] = rows[i][p * kPanel + c]. Is it finite? */
inline bool panel_of(const float* rows, const uint32_t* which, int64_t n, int64_t d, float* out, int64_t p) {
  int64_t columns = d - p * kPanel < kPanel ? d - p * kPanel : kPanel;
  out += p * n * kPanel;
  vf difference{};
  for (int64_t i = 0; i < n; ++i, out += kPanel) {
    std::memcpy(out, rows + (which ? int64_t(which[i]) : i) * d + p * kPanel, columns * sizeof(float));
    for (int64_t c = columns; c < kPanel; ++c) out[c] = 0;
    MLXSAE_UNROLL for (int v = 0; v < kTileVectors; ++v) difference += load(out + v * kLanes) - load(out + v * kLanes);
  }
  return sum(difference) == 0;
}

/** Panel p of the transposed rows: out[p][c][i] = rows[p * kPanel + i][c]. */
inline void turned_panel_of(const float* rows, int64_t n, int64_t d, float* out, int64_t p) {
  int64_t tokens[kPanel], m = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
  for (int64_t i = 0; i < m; ++i) tokens[i] = p * kPanel + i;
  pack<kPanel>(rows, d, tokens, m, out + p * d * kPanel);
}

/**
 * Entries of one feature over n tokens: `values` (zero where there is none) become scale * value and `dz` becomes
 * scale * dz, or zero where there is no entry. Returns the sum of the latter.
 */
inline float entries_of(float* values, float* dz, float scale, int64_t n) {
  Sum total;
  lanes(n, [&]<class V>(int64_t t) __attribute__((always_inline)) {
    V v = get<V>(values + t), z = scale * get<V>(dz + t);
    if constexpr (sizeof(V) == 4)
      z = v <= 0 ? 0 : z;
    else
      z = v <= V{} ? V{} : z;
    total.add(z);
    put(dz + t, z), put(values + t, scale * v);
  });
  return total.total();
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
