#pragma once
// The three products with a sparse code: decode (code @ W), its transpose (code^T @ rows) and the sampled product
// (rows @ W^T at the code's places). They are each other's derivatives. Accumulation is in float32.

#include "cpu/kernel_encode.h"

namespace mlxsae::cpu::MLXSAE_ISA {

struct Span {
  int64_t begin, end;
};
MLXSAE_INLINE Span entries(const Code& c, int64_t t) {
  return c.offsets ? Span{c.offsets[t], c.offsets[t + 1]} : Span{t * c.k, (t + 1) * c.k};
}

/** o += v * w. */
MLXSAE_INLINE void add_scaled(float* o, float v, const float* w, int64_t d) {
  vf s = splat(v);
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) store(o + c, load(o + c) + s * load(w + c));
  for (; c < d; ++c) o[c] += v * w[c];
}

/** o += v[0] * w[0] + ... + v[3] * w[3], one after the other; `next`: rows to fetch meanwhile. */
MLXSAE_INLINE void add_scaled4(float* o, const float* v, const float* const* w, const float* const* next, int64_t d) {
  vf s[4];
  MLXSAE_UNROLL for (int q = 0; q < 4; ++q) s[q] = splat(v[q]);
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    vf a = load(o + c);
    MLXSAE_UNROLL for (int q = 0; q < 4; ++q) {
      prefetch<2>(next[q] + c);
      a += s[q] * load(w[q] + c);
    }
    store(o + c, a);
  }
  for (; c < d; ++c)
    for (int q = 0; q < 4; ++q) o[c] += v[q] * w[q][c];
}

/** Of d numbers; `next`: memory to fetch meanwhile, `bytes` for each number, or null. */
MLXSAE_INLINE float dot(const float* a, const float* b, int64_t d, const char* next = nullptr, int64_t bytes = 0) {
  vf s[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= d; c += 4 * kLanes) {
    for (int64_t line = 0; next && line < 4 * kLanes * bytes; line += 64) prefetch<2>(next + c * bytes + line);
    MLXSAE_UNROLL for (int q = 0; q < 4; ++q) s[q] += load(a + c + q * kLanes) * load(b + c + q * kLanes);
  }
  for (; c + kLanes <= d; c += kLanes) s[0] += load(a + c) * load(b + c);
  float r = sum((s[0] + s[1]) + (s[2] + s[3]));
  for (; c < d; ++c) r += a[c] * b[c];
  return r;
}

/** Entry `i` of an array of any float type. */
MLXSAE_INLINE float number_at(const void* data, Type type, int64_t i) {
  float v = 0;
  with_type(type, [&]<class T>(T) { v = to_float(static_cast<const T*>(data)[i]); });
  return v;
}

/** out[at, at + d) = row, in the type of `out`. */
inline void store_row(void* out, Type type, int64_t at, const float* row, int64_t d) {
  with_type(type, [&]<class T>(T) {
    T* to = static_cast<T*>(out) + at;
    if constexpr (sizeof(T) == 4) {
      std::memcpy(to, row, d * 4);
    } else {
      for (int64_t c = 0; c < d; ++c) to[c] = from_float<T>(row[c]);
    }
  });
}

/** Where row `i` lies. */
MLXSAE_INLINE const char* place_of(const Rows& m, int64_t i) {
  return static_cast<const char*>(m.data) + i * m.d * (m.type == Type::f32 ? 4 : 2);
}

/** Row `i` as float32: the row itself, or its conversion in `scratch`. */
MLXSAE_INLINE const float* row_of(const Rows& m, int64_t i, float* scratch) {
  const char* row = place_of(m, i);
  switch (m.type) {
    case Type::f32:
      return reinterpret_cast<const float*>(row);
    case Type::f16:
      return as_float(reinterpret_cast<const f16*>(row), scratch, m.d);
    case Type::bf16:
      return as_float(reinterpret_cast<const bf16*>(row), scratch, m.d);
  }
  __builtin_unreachable();
}

inline void decode(const Code& code, const Rows& w, const void* bias, Type bias_type, void* out, Type out_type,
                   int64_t t0, int64_t t1) {
  static thread_local Scratch mem;
  int64_t d = w.d;
  float* sum_row = mem.get<float>(6 * d);
  float* bias_row = sum_row + d;
  float* converted = sum_row + 2 * d;
  for (int64_t c = 0; c < d; ++c) bias_row[c] = bias ? number_at(bias, bias_type, c) : 0.0f;
  for (int64_t t = t0; t < t1; ++t) {
    // Where nothing has to be converted, the row grows in place.
    float* o = out_type == Type::f32 ? static_cast<float*>(out) + t * d : sum_row;
    std::memcpy(o, bias_row, d * 4);
    auto [begin, end] = entries(code, t);
    float v[4];
    int64_t id[4];
    int m = 0;
    auto flush = [&](int64_t ahead) {
      const float *rows[4], *next[4];
      for (int q = 0; q < 4; ++q) {
        if (q >= m) v[q] = 0, id[q] = id[0];
        rows[q] = row_of(w, id[q], converted + q * d);
        next[q] = ahead + q < end ? reinterpret_cast<const float*>(place_of(w, code.indices[ahead + q])) : rows[q];
      }
      if (m == 4)
        add_scaled4(o, v, rows, next, d);
      else
        for (int q = 0; q < m; ++q) add_scaled(o, v[q], rows[q], d);
      m = 0;
    };
    for (int64_t i = begin; i < end; ++i) {
      float value = code.values ? number_at(code.values, code.type, i) : 1.0f;
      if (value == 0) continue;  // an unused slot: whatever its row holds, it adds nothing
      v[m] = value;
      id[m++] = code.indices[i];
      if (m == 4) flush(i + 1);
    }
    if (m) flush(end);
    if (o == sum_row) store_row(out, out_type, t * d, o, d);
  }
}

inline void gather_dot(const Rows& rows, const Rows& w, const Code& code, void* out, Type out_type, int64_t t0,
                       int64_t t1) {
  static thread_local Scratch mem;
  int64_t d = w.d, bytes = w.type == Type::f32 ? 4 : 2;
  float* row_f = mem.get<float>(2 * d);
  float* weight_f = row_f + d;
  for (int64_t t = t0; t < t1; ++t) {
    const float* r = row_of(rows, t, row_f);
    auto [begin, end] = entries(code, t);
    for (int64_t i = begin; i < end; ++i) {
      // Far enough that it is there in time.
      const char* next = i + 3 < end ? place_of(w, code.indices[i + 3]) : nullptr;
      float v = dot(r, row_of(w, code.indices[i], weight_f), d, next, bytes);
      store_row(out, out_type, i, &v, 1);
    }
  }
}

inline void outer(const ByFeature& by, const Rows& rows, void* out, Type out_type, int64_t f0, int64_t f1) {
  static thread_local Scratch mem;
  int64_t d = rows.d;
  float* sum_row = mem.get<float>(2 * d);
  float* converted = sum_row + d;
  for (int64_t j = f0; j < f1; ++j) {
    float* o = out_type == Type::f32 ? static_cast<float*>(out) + j * d : sum_row;
    std::memset(o, 0, d * 4);
    for (int64_t e = by.starts[j]; e < by.starts[j + 1]; ++e)
      if (by.values[e] != 0) add_scaled(o, by.values[e], row_of(rows, by.rows[e], converted), d);
    if (o == sum_row) store_row(out, out_type, j * d, o, d);
  }
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
