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
      prefetch(next[q] + c);
      a += s[q] * load(w[q] + c);
    }
    store(o + c, a);
  }
  for (; c < d; ++c)
    for (int q = 0; q < 4; ++q) o[c] += v[q] * w[q][c];
}

MLXSAE_INLINE float dot(const float* a, const float* b, int64_t d) {
  vf s[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= d; c += 4 * kLanes) {
    MLXSAE_UNROLL for (int q = 0; q < 4; ++q) s[q] += load(a + c + q * kLanes) * load(b + c + q * kLanes);
  }
  for (; c + kLanes <= d; c += kLanes) s[0] += load(a + c) * load(b + c);
  float r = sum((s[0] + s[1]) + (s[2] + s[3]));
  for (; c < d; ++c) r += a[c] * b[c];
  return r;
}

template <class T>
MLXSAE_INLINE void store_row(T* out, const float* row, int64_t d) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(out, row, d * 4);
  } else {
    for (int64_t c = 0; c < d; ++c) out[c] = from_float<T>(row[c]);
  }
}

inline void decode(const Code& code, const Rows& w, const void* bias, Type bias_type, void* out, Type out_type,
                   int64_t t0, int64_t t1) {
  static thread_local Scratch mem;
  int64_t d = w.d;
  float* sum_row = mem.get<float>(6 * d);
  float* bias_row = sum_row + d;
  float* converted = sum_row + 2 * d;
  for (int64_t c = 0; c < d; ++c) bias_row[c] = 0;
  if (bias)
    with_type(bias_type, [&]<class T>(T) {
      const float* b = as_float(static_cast<const T*>(bias), bias_row, d);
      if (b != bias_row) std::memcpy(bias_row, b, d * 4);
    });
  with_type(w.type, [&]<class TW>(TW) {
    with_type(code.type, [&]<class TV>(TV) {
      with_type(out_type, [&]<class TO>(TO) {
        const TW* weights = static_cast<const TW*>(w.data);
        const TV* values = static_cast<const TV*>(code.values);
        for (int64_t t = t0; t < t1; ++t) {
          // Where nothing has to be converted, the row grows in place.
          float* o = sizeof(TO) == 4 ? reinterpret_cast<float*>(static_cast<TO*>(out) + t * d) : sum_row;
          std::memcpy(o, bias_row, d * 4);
          auto [begin, end] = entries(code, t);
          float v[4];
          int64_t id[4];
          int m = 0;
          auto flush = [&](int64_t ahead) {
            const float *rows[4], *next[4];
            for (int q = 0; q < 4; ++q) {
              if (q >= m) v[q] = 0, id[q] = id[0];
              rows[q] = as_float(weights + id[q] * d, converted + q * d, d);
              next[q] = ahead + q < end ? reinterpret_cast<const float*>(weights + int64_t(code.indices[ahead + q]) * d)
                                        : rows[q];
            }
            if (m == 4)
              add_scaled4(o, v, rows, next, d);
            else
              for (int q = 0; q < m; ++q) add_scaled(o, v[q], rows[q], d);
            m = 0;
          };
          for (int64_t i = begin; i < end; ++i) {
            float value = values ? to_float(values[i]) : 1.0f;
            if (value == 0) continue;  // an unused slot: whatever its row holds, it adds nothing
            v[m] = value;
            id[m++] = code.indices[i];
            if (m == 4) flush(i + 1);
          }
          if (m) flush(end);
          if (sizeof(TO) != 4) store_row(static_cast<TO*>(out) + t * d, o, d);
        }
      });
    });
  });
}

inline void gather_dot(const Rows& rows, const Rows& w, const Code& code, void* out, Type out_type, int64_t t0,
                       int64_t t1) {
  static thread_local Scratch mem;
  int64_t d = w.d;
  float* row_f = mem.get<float>(2 * d);
  float* weight_f = row_f + d;
  with_type(rows.type, [&]<class TR>(TR) {
    with_type(w.type, [&]<class TW>(TW) {
      with_type(out_type, [&]<class TO>(TO) {
        const TW* weights = static_cast<const TW*>(w.data);
        for (int64_t t = t0; t < t1; ++t) {
          const float* r = as_float(static_cast<const TR*>(rows.data) + t * d, row_f, d);
          auto [begin, end] = entries(code, t);
          for (int64_t i = begin; i < end; ++i) {
            if (i + 1 < end) {
              const char* ahead = reinterpret_cast<const char*>(weights + int64_t(code.indices[i + 1]) * d);
              for (int64_t b = 0; b < d * int64_t(sizeof(TW)); b += 64) prefetch(ahead + b);
            }
            const float* weight = as_float(weights + int64_t(code.indices[i]) * d, weight_f, d);
            static_cast<TO*>(out)[i] = from_float<TO>(dot(r, weight, d));
          }
        }
      });
    });
  });
}

inline void outer(const ByFeature& by, const Rows& rows, void* out, Type out_type, int64_t f0, int64_t f1) {
  static thread_local Scratch mem;
  int64_t d = rows.d;
  float* sum_row = mem.get<float>(2 * d);
  float* converted = sum_row + d;
  with_type(rows.type, [&]<class TR>(TR) {
    with_type(out_type, [&]<class TO>(TO) {
      for (int64_t j = f0; j < f1; ++j) {
        float* o = sizeof(TO) == 4 ? reinterpret_cast<float*>(static_cast<TO*>(out) + j * d) : sum_row;
        std::memset(o, 0, d * 4);
        for (int64_t e = by.starts[j]; e < by.starts[j + 1]; ++e) {
          if (by.values[e] == 0) continue;
          add_scaled(o, by.values[e],
                     as_float(static_cast<const TR*>(rows.data) + int64_t(by.rows[e]) * d, converted, d), d);
        }
        if (sizeof(TO) != 4) store_row(static_cast<TO*>(out) + j * d, o, d);
      }
    });
  });
}

}  // namespace mlxsae::cpu::MLXSAE_ISA
