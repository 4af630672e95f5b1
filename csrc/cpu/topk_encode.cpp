#include "ops/topk_encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/eval.h"

namespace mlxsae {
namespace {

template <class T>
std::unique_ptr<T[]> room_for(int64_t n) {
  return std::make_unique_for_overwrite<T[]>(n);
}

/** The float32 kernel on the tokens [t0, t1) of `e`, shared out over the threads. */
void encode_all(const cpu::Encode& e, int64_t t0, int64_t t1) {
  const auto& kernels = cpu::kernels();
  int64_t n = t1 - t0, d_sae = e.w.n, threads = cpu::num_threads();
  if (n <= 0) return;
  // Blocks of tokens; where there are fewer than threads, each block's features are split as well.
  int64_t block =
      std::max<int64_t>(kernels.token_block * 1024 / std::max<int64_t>(1024, e.x.d), kernels.token_block / 2);
  int64_t blocks = (n + block - 1) / block;
  int64_t parts =
      blocks >= threads ? 1 : std::clamp<int64_t>(2 * threads / blocks, 1, std::max<int64_t>(1, d_sae / 256));
  auto task = [&](int64_t b, int64_t p) {
    cpu::Encode part = e;
    part.t0 = t0 + n * b / blocks, part.t1 = t0 + n * (b + 1) / blocks;
    part.f0 = d_sae * p / parts, part.f1 = d_sae * (p + 1) / parts;
    return part;
  };
  if (parts == 1) {
    cpu::parallel_for(blocks, [&](int64_t i, int) { kernels.encode(task(i, 0)); });
    return;
  }
  // Candidates of each part: keys and ids [parts, t1, k], counts [parts, t1], for both selections.
  int64_t per_part = t1 * (2 * (e.k + e.k_aux) + 2);
  auto memory = room_for<int32_t>(parts * per_part);
  int32_t* next = memory.get();
  auto take = [&](int64_t size) { return std::exchange(next, next + size); };
  auto with_room = [&](cpu::Codes c) {
    c.room = c.k;
    c.keys = take(parts * t1 * c.k), c.ids = take(parts * t1 * c.k), c.counts = take(parts * t1);
    return c;
  };
  cpu::Codes main = with_room(e.out), aux = with_room(e.aux);
  auto part_of = [&](cpu::Codes c, int64_t p) {
    c.keys += p * t1 * c.k, c.ids += p * t1 * c.k, c.counts += p * t1;
    return c;
  };
  cpu::parallel_for(blocks * parts, [&](int64_t i, int) {
    int64_t p = i % parts;
    cpu::Encode part = task(i / parts, p);
    part.out = part_of(main, p), part.aux = part_of(aux, p);
    kernels.encode(part);
  });
  kernels.merge({main, parts, t1, t0, t1});
  if (e.mask) kernels.merge({aux, parts, t1, t0, t1});
}

/** The masked selection alone: the float32 kernel over the masked features only, in a copy that holds just these. */
void encode_masked(const cpu::Encode& e, const float* w) {
  std::vector<uint32_t> features;
  for (int64_t j = 0; j < e.w.n; ++j)
    if (e.mask[j]) features.push_back(static_cast<uint32_t>(j));
  int64_t m = static_cast<int64_t>(features.size()), d = e.w.d, n = e.x.n, k = std::min(e.k_aux, m);
  auto rows = room_for<float>(m * d + m);
  float* bias = rows.get() + m * d;
  cpu::parallel_ranges(m, 64, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      std::memcpy(rows.get() + i * d, w + features[i] * d, d * sizeof(float));
      bias[i] = e.bias[features[i]];
    }
  });
  auto values = room_for<float>(n * k);
  auto places = room_for<uint32_t>(n * k);
  if (k > 0) {
    cpu::Encode part{};
    part.x = e.x;
    part.w = {rows.get(), cpu::Type::f32, m, d};
    part.bias = bias;
    part.k = k;
    part.out = {k, values.get(), cpu::Type::f32, places.get(), nullptr, nullptr, nullptr, 0};
    encode_all(part, 0, n);
  }
  // Back to the numbers of the features; as candidates, so that the unused slots are filled like everywhere.
  auto memory = room_for<int32_t>(n * (2 * k + 1));
  cpu::Codes to = e.aux;
  to.room = k;
  to.keys = memory.get(), to.ids = to.keys + n * k, to.counts = to.ids + n * k;
  for (int64_t t = 0; t < n; ++t) {
    to.counts[t] = static_cast<int32_t>(k);
    for (int64_t i = 0; i < k; ++i) {
      to.keys[t * k + i] = cpu::order_key(values[t * k + i]);
      to.ids[t * k + i] = static_cast<int32_t>(features[places[t * k + i]]);
    }
  }
  cpu::kernels().merge({to, 1, n, 0, n});
}

/** Screen in bfloat16, then the float32 pre-activations of what may be among the k largest (cpu/kernel_screen.h). */
void encode_screened(const cpu::Encode& e, const uint16_t* w16, const float* columns) {
  const auto& kernels = cpu::kernels();
  int64_t n = e.x.n, d = e.x.d, d_sae = e.w.n, k = e.k;
  auto* x = static_cast<const float*>(e.x.data);
  auto* w = static_cast<const float*>(e.w.data);

  int64_t capacity = std::min(16 * k + 64, d_sae + 1);
  auto ids = room_for<int32_t>(n * capacity);
  auto counts = room_for<int32_t>(n);
  auto norms = room_for<float>(n);
  int64_t block = kernels.token_block * 2 * 1024 / std::max<int64_t>(1024, d);
  block = std::clamp<int64_t>(block, 64, std::max<int64_t>(64, n / cpu::num_threads()));
  int64_t blocks = (n + block - 1) / block;
  cpu::parallel_for(blocks, [&](int64_t i, int) {
    kernels.screen({x, d, d_sae, k, capacity, w16, columns, e.bias, n * i / blocks, n * (i + 1) / blocks, ids.get(),
                    counts.get(), norms.get()});
  });

  // All candidates, sorted by feature: a feature's row then serves all its tokens.
  std::vector<int64_t> starts(d_sae + 1, 0);
  int64_t total = 0;
  for (int64_t t = 0; t < n; ++t)
    for (int32_t i = 0; i < counts[t]; ++i) ++starts[ids[t * capacity + i] + 1], ++total;
  for (int64_t j = 0; j < d_sae; ++j) starts[j + 1] += starts[j];
  auto rows = room_for<uint32_t>(total), features = room_for<uint32_t>(total), slots = room_for<uint32_t>(total);
  for (int64_t t = 0, slot = 0; t < n; ++t)
    for (int32_t i = 0; i < counts[t]; ++i) {
      int32_t f = ids[t * capacity + i];
      int64_t q = starts[f]++;
      rows[q] = static_cast<uint32_t>(t), features[q] = static_cast<uint32_t>(f),
      slots[q] = static_cast<uint32_t>(slot++);
    }
  auto each = [&](int64_t m, auto&& f) {  // ranges in whole groups of eight
    cpu::parallel_ranges((m + 7) / 8, 64, [&](int64_t a, int64_t b) { f(a * 8, std::min(m, b * 8)); });
  };

  // First fast sums, whose order nobody promises: they leave hardly more than k of a token.
  auto sums = room_for<float>(total), by_slot = room_for<float>(total);
  cpu::Rescore r{x, w, e.bias, d, rows.get(), features.get(), sums.get()};
  each(total, [&](int64_t a, int64_t b) { kernels.estimate(r, a, b); });
  float gamma = 2 * static_cast<float>(d + 16) * 5.97e-8f;
  auto error = [&](int64_t t, uint32_t f) {
    return 1.0001f * gamma * norms[t] * columns[f] + columns[2 * d_sae + f] + 4e-38f * d * norms[t] +
           2.4e-7f * std::fabs(e.bias[f]);
  };
  auto first = room_for<int64_t>(n + 1);
  first[0] = 0;
  for (int64_t t = 0; t < n; ++t) first[t + 1] = first[t] + std::max(0, counts[t]);
  auto bound = room_for<float>(n);
  for (int64_t q = 0; q < total; ++q) by_slot[slots[q]] = sums[q] - error(rows[q], features[q]);
  cpu::parallel_ranges(n, 16, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t)
      if (counts[t] > 0) {
        float* low = by_slot.get() + first[t];
        std::nth_element(low, low + k - 1, low + counts[t], std::greater<>());
        bound[t] = low[k - 1];
      }
  });
  int64_t kept = 0;
  for (int64_t q = 0; q < total; ++q) {
    bool stay = !(sums[q] + error(rows[q], features[q]) < bound[rows[q]]);
    rows[kept] = rows[q], features[kept] = features[q], slots[kept] = slots[q];
    kept += stay;
  }
  // Then the sums of the encode kernel itself.
  each(kept, [&](int64_t a, int64_t b) { kernels.rescore(r, a, b); });
  auto keys = room_for<int32_t>(total), places = room_for<int32_t>(total);
  for (int64_t i = 0; i < total; ++i) places[i] = -1;
  for (int64_t q = 0; q < kept; ++q) {
    keys[slots[q]] = cpu::order_key(sums[q]);
    places[slots[q]] = static_cast<int32_t>(features[q]);
  }
  std::vector<int64_t> redo;
  cpu::Codes to = e.out;
  to.room = capacity;
  auto final_keys = room_for<int32_t>(n * capacity);
  to.keys = final_keys.get(), to.ids = ids.get(), to.counts = counts.get();
  for (int64_t t = 0; t < n; ++t) {
    if (counts[t] < 0) {
      redo.push_back(t);
      counts[t] = 0;
      continue;
    }
    int32_t m = 0;
    for (int64_t i = first[t]; i < first[t + 1]; ++i)
      if (places[i] >= 0) {
        to.keys[t * capacity + m] = keys[i];
        to.ids[t * capacity + m++] = places[i];
      }
    counts[t] = m;
  }
  cpu::parallel_ranges(n, 16, [&](int64_t t0, int64_t t1) { kernels.merge({to, 1, n, t0, t1}); });
  cpu::Encode plain = e;
  plain.mask = nullptr, plain.k_aux = 0;
  if (redo.size() * 8 > static_cast<size_t>(n)) {
    encode_all(plain, 0, n);
  } else {
    for (int64_t t : redo) encode_all(plain, t, t + 1);
  }
}

}  // namespace

void TopKEncode::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) cpu::allocate(out);
  auto codes = [&](int i, int k) {
    return cpu::Codes{k,
                      outputs[i].data<char>(),
                      cpu::type_of(outputs[i]),
                      outputs[i + 1].data<uint32_t>(),
                      nullptr,
                      nullptr,
                      nullptr,
                      0};
  };
  cpu::Encode e{};
  e.x = cpu::rows_of(inputs[0]);
  e.w = cpu::rows_of(inputs[1]);
  e.bias = inputs[2].data<float>();
  e.k = k_;
  e.out = codes(0, k_);
  if (k_aux_ > 0) {
    e.mask = inputs[3].data<bool>();
    e.k_aux = k_aux_;
    e.aux = codes(2, k_aux_);
  }
  const uint16_t* w16 = nullptr;
  const float* columns = nullptr;
  if (certified_) {
    w16 = inputs[inputs.size() - 2].data<uint16_t>();
    columns = inputs[inputs.size() - 1].data<float>();
  }
  cpu::dispatch(stream(), inputs, outputs, [e, w16, columns] {
    // Few tokens are bound by reading the weights once; and a width or a k that the screen cannot thin out gains
    // nothing.
    bool screen = w16 && cpu::kernels().screen && e.x.n >= 32 && 4 * e.k <= e.w.n && e.w.n < INT32_MAX / 2;
    if (screen)
      for (int64_t j = 0; j < e.w.n && screen; ++j) screen = columns[j] < 1e18f;
    if (!screen) return encode_all(e, 0, e.x.n);
    encode_screened(e, w16, columns);
    if (e.mask) encode_masked(e, static_cast<const float*>(e.w.data));
  });
}

}  // namespace mlxsae
