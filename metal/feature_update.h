#pragma once
// The backward pass of encode and decode and one Adam step, feature by feature. For feature j with entries (t, v):
//
//   dz_t    = <g_t, w_dec[j]>                 g_t = scale * residual_t
//   dw_dec  = sum v g_t                       dw_enc = sum dz_t x_t        db_enc = sum dz_t
//   dw_dec -= (sum v dz_t) w_dec[j]           where projection is asked for: <dw_dec, w_dec[j]> is that sum
//   Adam on w_dec[j], w_enc[j], b_enc[j];     w_dec[j] /= |w_dec[j]| where the norm is kept
//
// A team walks over the features of its part: a simdgroup where a row fits into its registers, else a threadgroup. A
// thread keeps its columns of w_dec and of both gradients in registers, so that parameters and moments are read once
// and written once and gradients are never stored; the rows of x and residual come through the cache. Rows too long for
// a threadgroup's registers are walked block by block (feature_update_wide). The entries come sorted by feature
// (code_sort.h); those of the auxiliary terms have rows from n on, as have their residuals, one after the other.
//
// A part has features that cost about as much as any other part's, found from the entries, whatever the chip: sums over
// parts have the same bits on every run. Where the loss is not finite everything keeps its value. New parameters and
// moments may lie in the memory of the old ones: a thread reads its numbers before it writes them. M, the type in which
// the moments of both matrices are kept, is float or bfloat (common/rounding.h); arithmetic is in float32 either way.

#include "common/adam.h"
#include "encoder_shadow.h"

// What the host and the batch decide for all threads: one array, so that the kernels keep room for the weights.
constant constexpr uint kLive = 0;  // 1 where the loss is finite
constant constexpr uint kClip = 1;  // factor on every gradient
constant constexpr uint kBeta1 = 2, kBeta2 = 3, kEps = 4;
constant constexpr uint kStepSize = 5;  // lr / (1 - beta1^t)
constant constexpr uint kInverse = 6;   // 1 / sqrt(1 - beta2^t)
constant constexpr uint kSeed = 7;      // of the noise that rounds moments: bits, not a number
constant constexpr uint kScales = 8;    // of each term's residual, to the end

constant constexpr uint kProject = 1, kNormalize = 2;
constant constexpr uint kThrough = 4;  // sum up db_enc[j] w_enc[j], what b_dec gets through the input
constant constexpr uint kSums = 8;     // sum up the squares of all gradients (and the above)
constant constexpr uint kDry = 16;     // sums only, change nothing
constant constexpr uint kShadow = 32;  // keep the encoder's shadow
constant constexpr uint kKeepEncoder = 64, kKeepDecoder = 128;  // rows of features without entries stay what they are
constant constexpr uint kKeeps = kKeepEncoder | kKeepDecoder;

constant constexpr int kColumns = 4;             // pieces of a row in each thread's registers
constant constexpr int kEntries = 4;             // entries whose products are summed up at once
constant constexpr uint kEntriesPerFeature = 4;  // the work on a feature's row, in entries

/** All but the clip. */
METAL_FUNC void read_adam(const device float* control, thread Adam& a) {
  a.beta1 = control[kBeta1];
  a.beta2 = control[kBeta2];
  a.eps = control[kEps];
  a.step_size = control[kStepSize];
  a.inverse = control[kInverse];
  a.live = control[kLive] != 0.0f;
  a.seed = as_type<uint>(control[kSeed]);
}

/** The first feature of a part: where its share of the work begins. */
METAL_FUNC uint part_begin(const device uint* starts, uint d_sae, uint part, uint parts) {
  ulong all = starts[d_sae] + ulong(kEntriesPerFeature) * d_sae, goal = all * part / parts;
  uint low = 0, high = d_sae;
  while (low < high) {
    uint middle = low + (high - low) / 2;
    if (starts[middle] + ulong(kEntriesPerFeature) * middle < goal)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/** control[] for the other kernels, but for the scales. */
[[kernel]] void update_begin(const device float* loss [[buffer(0)]], device float* control [[buffer(1)]],
                             constant float& beta1 [[buffer(2)]], constant float& beta2 [[buffer(3)]],
                             constant float& eps [[buffer(4)]], constant float& step_size [[buffer(5)]],
                             constant float& inverse [[buffer(6)]], constant uint& seed [[buffer(7)]],
                             uint tid [[thread_position_in_grid]]) {
  if (tid != 0) return;
  control[kLive] = is_finite(loss[0]) ? 1.0f : 0.0f;
  control[kClip] = 1.0f;
  control[kBeta1] = beta1;
  control[kBeta2] = beta2;
  control[kEps] = eps;
  control[kStepSize] = step_size;
  control[kInverse] = inverse;
  control[kSeed] = as_type<float>(seed);
}

/** A term's scale to control[], and `size` numbers of its residual to where those of all auxiliary terms stand. */
[[kernel]] void update_term(const device float* scale [[buffer(0)]], const device float* residual [[buffer(1)]],
                            device float* control [[buffer(2)]], device float* stacked [[buffer(3)]],
                            constant uint& term [[buffer(4)]], constant long& size [[buffer(5)]],
                            uint group [[threadgroup_position_in_grid]], uint groups [[threadgroups_per_grid]],
                            uint tid [[thread_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  const ulong first = ulong(group) * simdgroups * kSimd + tid;
  if (first == 0) control[kScales + term] = scale[0];
  for (ulong i = first; i < ulong(size); i += ulong(groups) * simdgroups * kSimd) stacked[i] = residual[i];
}

/** kGroup: a team is a threadgroup; else a simdgroup. A row has at most kColumns V numbers for each thread of a team.
 * db [d_sae] takes db_enc, squares [parts] and through [parts, d_in] the sums of the parts. */
template <int V, bool kGroup, typename M>
[[kernel, max_total_threads_per_threadgroup(512)]] void feature_update(
    const device float* x [[buffer(0)]], const device float* residual [[buffer(1)]],
    const device float* residual_aux [[buffer(2)]], const device uint* starts [[buffer(3)]],
    const device uint* rows [[buffer(4)]], const device float* values [[buffer(5)]],
    const device float* control [[buffer(6)]], const device float* w_enc [[buffer(7)]],
    const device M* m_enc [[buffer(8)]], const device M* v_enc [[buffer(9)]], const device float* w_dec [[buffer(10)]],
    const device M* m_dec [[buffer(11)]], const device M* v_dec [[buffer(12)]], device float* w_enc_out [[buffer(13)]],
    device M* m_enc_out [[buffer(14)]], device M* v_enc_out [[buffer(15)]], device float* w_dec_out [[buffer(16)]],
    device M* m_dec_out [[buffer(17)]], device M* v_dec_out [[buffer(18)]], device bfloat* w16 [[buffer(19)]],
    device float* columns [[buffer(20)]], device float* db_enc [[buffer(21)]], device float* through [[buffer(22)]],
    device float* squares [[buffer(23)]], constant uint& n [[buffer(24)]], constant uint& d_in [[buffer(25)]],
    constant uint& d_out [[buffer(26)]], constant uint& d_sae [[buffer(27)]], constant uint& parts [[buffer(28)]],
    constant uint& flags [[buffer(29)]], uint group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float pad[kPad];
  uint turn = 0;
  const uint part = kGroup ? group : group * simdgroups + simdgroup;
  const uint me = kGroup ? tid : lane, team = kGroup ? simdgroups * kSimd : kSimd;
  if (part >= parts) return;
  Adam adam;
  read_adam(control, adam);
  adam.clip = control[kClip];
  const uint f0 = part_begin(starts, d_sae, part, parts), f1 = part_begin(starts, d_sae, part + 1, parts);
  const bool dry = (flags & kDry) != 0, sums = (flags & kSums) != 0, shadow = (flags & kShadow) != 0 && !dry;

  uint c[kColumns];
  Lanes<V> pass_through[kColumns];
  for (int u = 0; u < kColumns; ++u) {
    c[u] = (uint(u) * team + me) * V;
    pass_through[u] = Lanes<V>(0.0f);
  }
  float square = 0.0f;

  for (uint j0 = f0; j0 < f1; j0 += kSimd) {
    const uint count = min(kSimd, f1 - j0);
    const uint start = starts[min(j0 + lane, f1)], stop = starts[min(j0 + lane + 1, f1)];
    float my_db = 0.0f;  // of the feature with this thread's number: such numbers are stored together
    float3 my_shadow = float3(0.0f);
    for (uint i = 0; i < count; ++i) {
      const uint end = simd_shuffle(stop, ushort(i));
      uint e0 = simd_shuffle(start, ushort(i));
      const bool any = e0 < end;
      if (!any && (dry || (flags & kKeeps) != 0)) continue;
      const ulong enc = ulong(j0 + i) * d_in, dec = ulong(j0 + i) * d_out;
      Lanes<V> w[kColumns], g_dec[kColumns], g_enc[kColumns];
      for (int u = 0; u < kColumns; ++u) {
        w[u] = g_dec[u] = g_enc[u] = Lanes<V>(0.0f);
        if (c[u] < d_out) w[u] = load<float, V>(w_dec + dec + c[u]);
      }

      float db = 0.0f, along = 0.0f;
      for (; e0 < end; e0 += kSimd) {
        const uint here = min(kSimd, end - e0);
        const uint entry_row = lane < here ? rows[e0 + lane] : 0;
        const float value = lane < here ? values[e0 + lane] : 0.0f;
        for (uint first = 0; first < here; first += kEntries) {
          float dz[kEntries];
          for (int q = 0; q < kEntries; ++q) {
            dz[q] = 0.0f;
            if (first + q >= here) continue;
            const uint t = simd_shuffle(entry_row, ushort(first + q));
            const float s = control[kScales + t / n], v = s * simd_shuffle(value, ushort(first + q));
            const device float* r = t < n ? residual + ulong(t) * d_out : residual_aux + ulong(t - n) * d_out;
            Lanes<V> product = Lanes<V>(0.0f);
            for (int u = 0; u < kColumns; ++u) {
              if (c[u] >= d_out) continue;
              const Lanes<V> g = load<float, V>(r + c[u]);
              product += g * w[u];
              g_dec[u] = scaled(v, g, g_dec[u]);
            }
            dz[q] = s * sum(product);
          }
          team_sum<kEntries, kGroup>(dz, pad, turn, lane, simdgroup, simdgroups);
          for (int q = 0; q < kEntries; ++q) {
            if (first + q >= here) continue;
            const uint t = simd_shuffle(entry_row, ushort(first + q));
            db += dz[q];
            along += simd_shuffle(value, ushort(first + q)) * dz[q];
            const device float* from = x + ulong(t % n) * d_in;
            for (int u = 0; u < kColumns; ++u)
              if (c[u] < d_in) g_enc[u] = scaled(dz[q], load<float, V>(from + c[u]), g_enc[u]);
          }
        }
      }

      if ((flags & kProject) && any)
        for (int u = 0; u < kColumns; ++u) g_dec[u] -= along * w[u];
      if (sums) {
        Lanes<V> part_square = Lanes<V>(0.0f);
        for (int u = 0; u < kColumns; ++u) part_square += g_dec[u] * g_dec[u] + g_enc[u] * g_enc[u];
        square += sum(part_square) + (me == 0 ? db * db : 0.0f);
      }

      // w_enc: summed up and stepped; w_dec: stepped, and stored once its norm is known.
      Lanes<V> norm = Lanes<V>(0.0f), full = norm, rest = norm, low = norm;
      for (int u = 0; u < kColumns; ++u) {
        if (c[u] < d_in) {
          const ulong place = enc + c[u];
          Lanes<V> old = load<float, V>(w_enc + place);
          if (any && sums && (flags & kThrough)) pass_through[u] = scaled(db, old, pass_through[u]);
          if (!dry) {
            old = adam_piece<V, M>(adam, adam.live, old, g_enc[u], m_enc + place, v_enc + place, m_enc_out + place,
                                   v_enc_out + place, noise_enc(adam, j0 + i) + c[u]);
            store<float, V>(w_enc_out + place, old);
            if (shadow) shadow_piece<V>(old, w16 + place, full, rest, low);
          }
        }
        if (!dry && c[u] < d_out) {
          const ulong place = dec + c[u];
          w[u] = adam_piece<V, M>(adam, adam.live, w[u], g_dec[u], m_dec + place, v_dec + place, m_dec_out + place,
                                  v_dec_out + place, noise_dec(adam, j0 + i) + c[u]);
          norm += w[u] * w[u];
        }
      }
      if (lane == i) my_db = db;
      if (dry) continue;
      float totals[4] = {sum(norm), sum(full), sum(rest), sum(low)};
      if (shadow || (flags & kNormalize)) team_sum<4, kGroup>(totals, pad, turn, lane, simdgroup, simdgroups);
      float inverse = 1.0f;
      if ((flags & kNormalize) && adam.live && totals[0] > 0.0f) inverse = 1.0f / precise::sqrt(totals[0]);
      for (int u = 0; u < kColumns; ++u)
        if (c[u] < d_out) store<float, V>(w_dec_out + dec + c[u], w[u] * inverse);
      if (lane == i) my_shadow = shadow_columns(totals[1], totals[2], totals[3], d_in);
    }
    if (me >= count) continue;
    if (sums) db_enc[j0 + me] = my_db;
    if (shadow && (start < stop || (flags & kKeeps) == 0)) store_columns(my_shadow, columns, d_sae, j0 + me);
  }

  if (!sums) return;
  float total[1] = {square};
  team_sum<1, kGroup>(total, pad, turn, lane, simdgroup, simdgroups);
  if (me == 0) squares[part] = total[0];
  if (flags & kThrough)
    for (int u = 0; u < kColumns; ++u)
      if (c[u] < d_in) store<float, V>(through + ulong(part) * d_in + c[u], pass_through[u]);
}

/** feature_update for rows of any length, a threadgroup a part. dz of every entry is kept in `products` [nnz], so that
 * blocks of columns are walked one after the other; w_dec is read twice and, to be renormed, written twice. */
template <int V, typename M>
[[kernel, max_total_threads_per_threadgroup(512)]] void feature_update_wide(
    const device float* x [[buffer(0)]], const device float* residual [[buffer(1)]],
    const device float* residual_aux [[buffer(2)]], const device uint* starts [[buffer(3)]],
    const device uint* rows [[buffer(4)]], const device float* values [[buffer(5)]],
    const device float* control [[buffer(6)]], const device float* w_enc [[buffer(7)]],
    const device M* m_enc [[buffer(8)]], const device M* v_enc [[buffer(9)]], const device float* w_dec [[buffer(10)]],
    const device M* m_dec [[buffer(11)]], const device M* v_dec [[buffer(12)]], device float* w_enc_out [[buffer(13)]],
    device M* m_enc_out [[buffer(14)]], device M* v_enc_out [[buffer(15)]], device float* w_dec_out [[buffer(16)]],
    device M* m_dec_out [[buffer(17)]], device M* v_dec_out [[buffer(18)]], device bfloat* w16 [[buffer(19)]],
    device float* columns [[buffer(20)]], device float* db_enc [[buffer(21)]], device float* through [[buffer(22)]],
    device float* squares [[buffer(23)]], constant uint& n [[buffer(24)]], constant uint& d_in [[buffer(25)]],
    constant uint& d_out [[buffer(26)]], constant uint& d_sae [[buffer(27)]], constant uint& parts [[buffer(28)]],
    constant uint& flags [[buffer(29)]], device float* products [[buffer(30)]],
    uint part [[threadgroup_position_in_grid]], uint tid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float pad[kPad];
  uint turn = 0;
  Adam adam;
  read_adam(control, adam);
  adam.clip = control[kClip];
  const uint f0 = part_begin(starts, d_sae, part, parts), f1 = part_begin(starts, d_sae, part + 1, parts);
  const bool dry = (flags & kDry) != 0, sums = (flags & kSums) != 0, shadow = (flags & kShadow) != 0 && !dry;
  const bool passes = sums && (flags & kThrough) != 0;
  const uint step = simdgroups * kSimd * V;
  device float* passed = through + ulong(part) * d_in;
  if (passes)
    for (uint c = tid * V; c < d_in; c += step) store<float, V>(passed + c, Lanes<V>(0.0f));
  float square = 0.0f;

  for (uint j = f0; j < f1; ++j) {
    const uint begin = starts[j], end = starts[j + 1];
    if (begin == end && (dry || (flags & kKeeps) != 0)) {
      if (sums && tid == 0) db_enc[j] = 0.0f;
      continue;
    }
    const ulong enc = ulong(j) * d_in, dec = ulong(j) * d_out;
    float db = 0.0f, along = 0.0f;
    for (uint e0 = begin; e0 < end; e0 += kEntries) {
      float dz[kEntries];
      for (int q = 0; q < kEntries; ++q) {
        dz[q] = 0.0f;
        if (e0 + q >= end) continue;
        const uint t = rows[e0 + q];
        const device float* r = t < n ? residual + ulong(t) * d_out : residual_aux + ulong(t - n) * d_out;
        Lanes<V> product = Lanes<V>(0.0f);
        for (uint c = tid * V; c < d_out; c += step) product += load<float, V>(r + c) * load<float, V>(w_dec + dec + c);
        dz[q] = control[kScales + t / n] * sum(product);
      }
      team_sum<kEntries, true>(dz, pad, turn, lane, simdgroup, simdgroups);
      for (int q = 0; q < kEntries; ++q) {
        if (e0 + q >= end) continue;
        db += dz[q];
        along += values[e0 + q] * dz[q];
        if (tid == 0) products[e0 + q] = dz[q];
      }
    }
    threadgroup_barrier(mem_flags::mem_device);  // `products` is there
    if (!(flags & kProject)) along = 0.0f;

    Lanes<V> norm = Lanes<V>(0.0f), full = norm, rest = norm, low = norm, part_square = norm;
    for (uint c = tid * V; c < d_out; c += step) {
      const Lanes<V> w = load<float, V>(w_dec + dec + c);
      Lanes<V> g = Lanes<V>(0.0f);
      for (uint e = begin; e < end; ++e) {
        const uint t = rows[e];
        const device float* r = t < n ? residual + ulong(t) * d_out : residual_aux + ulong(t - n) * d_out;
        g = scaled(control[kScales + t / n] * values[e], load<float, V>(r + c), g);
      }
      if (begin < end) g -= along * w;
      part_square += g * g;
      if (dry) continue;
      const ulong place = dec + c;
      const Lanes<V> stepped = adam_piece<V, M>(adam, adam.live, w, g, m_dec + place, v_dec + place, m_dec_out + place,
                                                v_dec_out + place, noise_dec(adam, j) + c);
      store<float, V>(w_dec_out + place, stepped);
      norm += stepped * stepped;
    }
    for (uint c = tid * V; c < d_in; c += step) {
      const Lanes<V> w = load<float, V>(w_enc + enc + c);
      Lanes<V> g = Lanes<V>(0.0f);
      for (uint e = begin; e < end; ++e) {
        const uint t = rows[e];
        g = scaled(products[e], load<float, V>(x + ulong(t % n) * d_in + c), g);
      }
      part_square += g * g;
      if (passes && begin < end) store<float, V>(passed + c, scaled(db, w, load<float, V>(passed + c)));
      if (dry) continue;
      const ulong place = enc + c;
      const Lanes<V> stepped = adam_piece<V, M>(adam, adam.live, w, g, m_enc + place, v_enc + place, m_enc_out + place,
                                                v_enc_out + place, noise_enc(adam, j) + c);
      store<float, V>(w_enc_out + place, stepped);
      if (shadow) shadow_piece<V>(stepped, w16 + place, full, rest, low);
    }
    square += sum(part_square) + (tid == 0 ? db * db : 0.0f);
    if (sums && tid == 0) db_enc[j] = db;
    if (dry) continue;
    float totals[4] = {sum(norm), sum(full), sum(rest), sum(low)};
    team_sum<4, true>(totals, pad, turn, lane, simdgroup, simdgroups);
    if ((flags & kNormalize) && adam.live && totals[0] > 0.0f) {
      const float inverse = 1.0f / precise::sqrt(totals[0]);
      for (uint c = tid * V; c < d_out; c += step)
        store<float, V>(w_dec_out + dec + c, inverse * load<float, V>(w_dec_out + dec + c));
    }
    if (shadow && tid == 0) store_columns(shadow_columns(totals[1], totals[2], totals[3], d_in), columns, d_sae, j);
  }
  if (!sums) return;
  float total[1] = {square};
  team_sum<1, true>(total, pad, turn, lane, simdgroup, simdgroups);
  if (tid == 0) squares[part] = total[0];
}

/**
 * The features without entries where the walk leaves these out, by a threadgroup each: w_dec stays what it is, as does
 * w_enc (kKeepEncoder) or it makes the step by its momentum alone. What stays need not be touched where old and new are
 * one memory; else it is copied.
 */
template <int V, typename M>
[[kernel, max_total_threads_per_threadgroup(512)]] void update_spared(
    const device uint* starts [[buffer(0)]], const device float* control [[buffer(1)]],
    const device float* w_enc [[buffer(2)]], const device M* m_enc [[buffer(3)]], const device M* v_enc [[buffer(4)]],
    const device float* w_dec [[buffer(5)]], const device M* m_dec [[buffer(6)]], const device M* v_dec [[buffer(7)]],
    device float* w_enc_out [[buffer(8)]], device M* m_enc_out [[buffer(9)]], device M* v_enc_out [[buffer(10)]],
    device float* w_dec_out [[buffer(11)]], device M* m_dec_out [[buffer(12)]], device M* v_dec_out [[buffer(13)]],
    device bfloat* w16 [[buffer(14)]], device float* columns [[buffer(15)]], constant uint& d_in [[buffer(16)]],
    constant uint& d_out [[buffer(17)]], constant uint& d_sae [[buffer(18)]], constant uint& flags [[buffer(19)]],
    uint j [[threadgroup_position_in_grid]], uint tid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float pad[kPad];
  uint turn = 0;
  if (starts[j] < starts[j + 1]) return;
  const uint first = tid * V, stride = simdgroups * kSimd * V;
  copy_row<V, M>(w_dec, m_dec, v_dec, w_dec_out, m_dec_out, v_dec_out, ulong(j) * d_out, d_out, first, stride);
  const ulong enc = ulong(j) * d_in;
  Adam adam;
  read_adam(control, adam);
  adam.clip = 1.0f;
  const bool shadow = (flags & kShadow) != 0, steps = adam.live && (flags & kKeepEncoder) == 0;
  if (!shadow && !steps) {
    copy_row<V, M>(w_enc, m_enc, v_enc, w_enc_out, m_enc_out, v_enc_out, enc, d_in, first, stride);
    return;
  }
  Lanes<V> full = Lanes<V>(0.0f), rest = full, low = full;
  for (uint c = first; c < d_in; c += stride) {
    const ulong place = enc + c;
    const Lanes<V> w = adam_piece<V, M>(adam, steps, load<float, V>(w_enc + place), Lanes<V>(0.0f), m_enc + place,
                                        v_enc + place, m_enc_out + place, v_enc_out + place, noise_enc(adam, j) + c);
    store<float, V>(w_enc_out + place, w);
    if (shadow) shadow_piece<V>(w, w16 + place, full, rest, low);
  }
  if (!shadow) return;
  float totals[3] = {sum(full), sum(rest), sum(low)};
  team_sum<3, true>(totals, pad, turn, lane, simdgroup, simdgroups);
  if (tid == 0) store_columns(shadow_columns(totals[0], totals[1], totals[2], d_in), columns, d_sae, j);
}

constant constexpr uint kSumSimdgroups = 8;

/** Sums of V columns over the rows that the threadgroup's simdgroups take in turn; simdgroup 0 has the result. */
template <int V>
METAL_FUNC Lanes<V> add_simdgroups(Lanes<V> mine, threadgroup Lanes<V>* pad, uint lane, uint simdgroup) {
  pad[simdgroup * kSimd + lane] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Lanes<V> total = Lanes<V>(0.0f);
  if (simdgroup == 0)
    for (uint s = 0; s < kSumSimdgroups; ++s) total += pad[s * kSimd + lane];
  return total;
}

/** chunk_sums[chunk]: the sum of the rows of one chunk of the residual. */
template <int V>
[[kernel]] void residual_sums(const device float* residual [[buffer(0)]], device float* chunk_sums [[buffer(1)]],
                              constant uint& n [[buffer(2)]], constant uint& d [[buffer(3)]],
                              constant uint& chunk [[buffer(4)]], uint2 group [[threadgroup_position_in_grid]],
                              uint lane [[thread_index_in_simdgroup]],
                              uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup Lanes<V> pad[kSumSimdgroups * kSimd];
  uint c = (group.x * kSimd + lane) * V, last = min(n, (group.y + 1) * chunk);
  Lanes<V> part = Lanes<V>(0.0f);
  if (c < d)
    for (uint t = group.y * chunk + simdgroup; t < last; t += kSumSimdgroups)
      part += load<float, V>(residual + ulong(t) * d + c);
  part = add_simdgroups<V>(part, pad, lane, simdgroup);
  if (simdgroup == 0 && c < d) store<float, V>(chunk_sums + ulong(group.y) * d + c, part);
}

/** The gradient of b_dec: scale * (sum of the residual) - (what came through the input), and its squares. */
template <int V>
[[kernel]] void bias_gradient(const device float* chunk_sums [[buffer(0)]], const device float* through [[buffer(1)]],
                              const device float* control [[buffer(2)]], device float* gradient [[buffer(3)]],
                              device float* squares [[buffer(4)]], constant uint& d [[buffer(5)]],
                              constant uint& chunks [[buffer(6)]], constant uint& parts [[buffer(7)]],
                              constant uint& flags [[buffer(8)]], uint group [[threadgroup_position_in_grid]],
                              uint lane [[thread_index_in_simdgroup]],
                              uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup Lanes<V> pad[kSumSimdgroups * kSimd];
  uint c = (group * kSimd + lane) * V;
  Lanes<V> part = Lanes<V>(0.0f);
  if (c < d) {
    for (uint i = simdgroup; i < chunks; i += kSumSimdgroups) part += load<float, V>(chunk_sums + ulong(i) * d + c);
    part *= control[kScales];
    if (flags & kThrough)
      for (uint i = simdgroup; i < parts; i += kSumSimdgroups) part -= load<float, V>(through + ulong(i) * d + c);
  }
  part = add_simdgroups<V>(part, pad, lane, simdgroup);
  if (simdgroup != 0) return;
  float square = simd_sum(sum(part * part));
  if (c < d) store<float, V>(gradient + c, part);
  if (lane == 0) squares[parts + group] = square;
}

/** One threadgroup: the norm of all gradients, the clip that follows from it, and Adam on b_dec. */
[[kernel, max_total_threads_per_threadgroup(512)]] void update_end(
    const device float* squares [[buffer(0)]], const device float* gradient [[buffer(1)]],
    device float* control [[buffer(2)]], const device float* b [[buffer(3)]], const device float* m [[buffer(4)]],
    const device float* v [[buffer(5)]], device float* b_out [[buffer(6)]], device float* m_out [[buffer(7)]],
    device float* v_out [[buffer(8)]], device float* norm [[buffer(9)]], constant uint& count [[buffer(10)]],
    constant uint& d [[buffer(11)]], constant float& clip_norm [[buffer(12)]], uint tid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float pad[kPad];
  uint turn = 0;
  Adam adam;
  read_adam(control, adam);
  float total[1] = {0.0f};
  for (uint i = tid; i < count; i += simdgroups * kSimd) total[0] += squares[i];
  team_sum<1, true>(total, pad, turn, lane, simdgroup, simdgroups);
  const float length = precise::sqrt(total[0]);
  adam.clip = clip_norm > 0.0f && length > clip_norm ? clip_norm / length : 1.0f;
  for (uint c = tid; c < d; c += simdgroups * kSimd)
    b_out[c] = adam_piece<1, float>(adam, adam.live, b[c], gradient[c], m + c, v + c, m_out + c, v_out + c);
  if (tid == 0) {
    norm[0] = adam.live ? length : not_a_number();
    control[kClip] = adam.clip;
  }
}

/** Adam on b_enc, once the clip is known. */
[[kernel]] void step_b_enc(const device float* db [[buffer(0)]], const device float* control [[buffer(1)]],
                           const device float* b [[buffer(2)]], const device float* m [[buffer(3)]],
                           const device float* v [[buffer(4)]], device float* b_out [[buffer(5)]],
                           device float* m_out [[buffer(6)]], device float* v_out [[buffer(7)]],
                           constant uint& d_sae [[buffer(8)]], const device uint* starts [[buffer(9)]],
                           constant uint& flags [[buffer(10)]], uint j [[thread_position_in_grid]]) {
  if (j >= d_sae) return;
  Adam adam;
  read_adam(control, adam);
  adam.clip = control[kClip];
  if ((flags & kKeepEncoder) && starts[j] == starts[j + 1]) adam.live = false;
  b_out[j] = adam_piece<1, float>(adam, adam.live, b[j], db[j], m + j, v + j, m_out + j, v_out + j);
}
