#include "ops/topk_encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu/dense.h"
#include "cpu/screened.h"

namespace mlxsae {
namespace {

using cpu::room_for;

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
    part.t0 = t0 + cpu::share_of_tokens(n, b, blocks), part.t1 = t0 + cpu::share_of_tokens(n, b + 1, blocks);
    part.f0 = d_sae * p / parts, part.f1 = d_sae * (p + 1) / parts;
    return part;
  };
  if (parts == 1) {
    cpu::parallel_for(blocks, [&](int64_t i, int) { kernels.encode(task(i, 0)); });
    return;
  }
  if (t0 > 0) {  // as if there were no others, so that nothing is as large as they are
    cpu::Encode these = e;
    auto from = [&](cpu::Codes& c) {
      if (!c.values) return;
      c.values = static_cast<char*>(c.values) + t0 * c.k * (c.type == cpu::Type::f32 ? 4 : 2), c.indices += t0 * c.k;
    };
    these.x.data = static_cast<const char*>(e.x.data) + t0 * e.x.d * (e.x.type == cpu::Type::f32 ? 4 : 2);
    these.x.n = n;
    from(these.out), from(these.aux);
    return encode_all(these, 0, n);
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
  float* rows = cpu::workspace().get(m * d + m);
  float* bias = rows + m * d;
  cpu::parallel_ranges(m, 64, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      std::memcpy(rows + i * d, w + features[i] * d, d * sizeof(float));
      bias[i] = e.bias[features[i]];
    }
  });
  cpu::Encode part{};
  part.x = e.x;
  part.w = {rows, cpu::Type::f32, m, d};
  part.bias = bias;
  part.k = k;
  part.out = e.aux;
  if (k == e.k_aux) {
    encode_all(part, 0, n);
    cpu::parallel_ranges(n * k, 1 << 14, [&](int64_t a, int64_t b) {  // back to the numbers of the features
      for (int64_t i = a; i < b; ++i) e.aux.indices[i] = features[e.aux.indices[i]];
    });
    return;
  }
  auto values = room_for<float>(n * k);
  auto places = room_for<uint32_t>(n * k);
  part.out = {k, values.get(), cpu::Type::f32, places.get(), nullptr, nullptr, nullptr, 0};
  if (k > 0) encode_all(part, 0, n);
  // As candidates, so that the unused slots are filled like everywhere.
  auto memory = room_for<int32_t>(n * (2 * k + 1));
  cpu::Codes to = e.aux;
  to.room = k;
  to.keys = memory.get(), to.ids = to.keys + n * k, to.counts = to.ids + n * k;
  cpu::parallel_ranges(n, 16, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t) {
      to.counts[t] = static_cast<int32_t>(k);
      for (int64_t i = 0; i < k; ++i) {
        to.keys[t * k + i] = cpu::order_key(values[t * k + i]);
        to.ids[t * k + i] = static_cast<int32_t>(features[places[t * k + i]]);
      }
    }
    cpu::kernels().merge({to, 1, n, t0, t1});
  });
}

/** Screen, then the float32 pre-activations of what may be among the k largest (cpu/kernel_screen.h). */
void encode_screened(const cpu::Encode& e, const cpu::Shadowed& by) {
  int64_t n = e.x.n, k = e.k, room = std::min(16 * k + 64, e.w.n + 1);
  cpu::Candidates found(by, k, 0, room);
  if (!found.usable() || found.too_many_to_redo()) return encode_all(e, 0, n);
  int64_t total = found.size();

  // First fast sums, whose order nobody promises: they leave hardly more than k of a token.
  found.estimate();
  auto low = room_for<float>(total), bound = room_for<float>(n);
  std::fill_n(low.get(), total, -INFINITY);
  cpu::parallel_ranges(found.size(), 4096, [&](int64_t a, int64_t b) {
    for (int64_t q = a; q < b; ++q) low[found.slot(q)] = found.sum(q) - found.error(q);
  });
  cpu::parallel_ranges(n, 16, [&](int64_t t0, int64_t t1) {
    for (int64_t t = t0; t < t1; ++t)
      if (float *begin = low.get() + found.first(t), *end = low.get() + found.first(t + 1); begin < end) {
        std::nth_element(begin, begin + k - 1, end, std::greater<>());
        bound[t] = begin[k - 1];
      }
  });
  found.keep([&](int64_t q) { return !(found.sum(q) + found.error(q) < bound[found.row(q)]); });
  // Then the sums of the encode kernel itself.
  found.rescore();

  auto keys = room_for<int32_t>(total), places = room_for<int32_t>(total);
  std::fill_n(places.get(), total, -1);
  cpu::parallel_ranges(found.size(), 4096, [&](int64_t a, int64_t b) {
    for (int64_t q = a; q < b; ++q) {
      keys[found.slot(q)] = cpu::order_key(found.sum(q));
      places[found.slot(q)] = static_cast<int32_t>(found.feature(q));
    }
  });
  cpu::parallel_ranges(n, 16, [&](int64_t t0, int64_t t1) {
    auto memory = room_for<int32_t>((t1 - t0) * (2 * room + 1));
    cpu::Codes to = e.out;
    to.room = room;
    // The merge of these tokens alone: it counts them from 0.
    to.values = static_cast<char*>(to.values) + t0 * k * (to.type == cpu::Type::f32 ? 4 : 2), to.indices += t0 * k;
    to.keys = memory.get(), to.ids = to.keys + (t1 - t0) * room, to.counts = to.ids + (t1 - t0) * room;
    for (int64_t t = t0; t < t1; ++t) {
      int32_t m = 0;
      for (int64_t i = found.first(t); i < found.first(t + 1); ++i)
        if (places[i] >= 0) {
          to.keys[(t - t0) * room + m] = keys[i];
          to.ids[(t - t0) * room + m++] = places[i];
        }
      to.counts[t - t0] = m;
    }
    cpu::kernels().merge({to, 1, t1 - t0, 0, t1 - t0});
  });
  if (e.mask) encode_masked(e, static_cast<const float*>(e.w.data));
  // With the mask: only here may pre-activations be infinite, and what is as low as unused is filled from all features.
  for (auto [t0, t1] : found.redo()) encode_all(e, t0, t1);
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
  auto by = cpu::Shadowed::of(e.x, e.w, e.bias, product_.certified ? &inputs[inputs.size() - 2] : nullptr);
  cpu::dispatch(stream(), inputs, outputs, [e, by] {
    // A second product over the masked features takes more than the screen of the first one spares where they are many.
    bool many = !by.w16 && e.mask && 4 * std::count(e.mask, e.mask + e.w.n, true) > e.w.n;
    if (many || !by.usable(e.k)) return encode_all(e, 0, e.x.n);
    encode_screened(e, by);
  });
}

}  // namespace mlxsae
