#include "ops/topk_encode.h"

#include <algorithm>
#include <utility>

#include "cpu/eval.h"

namespace mlxsae {

void TopKEncode::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) cpu::allocate(out);
  auto codes = [&](int i, int k) {
    return cpu::Codes{k, outputs[i].data<char>(), cpu::type_of(outputs[i]), outputs[i + 1].data<uint32_t>(), nullptr,
                      nullptr, nullptr};
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

  cpu::dispatch(stream(), inputs, outputs, [e] {
    const auto& kernels = cpu::kernels();
    int64_t n = e.x.n, d_sae = e.w.n, threads = cpu::num_threads();
    if (n == 0) return;
    // Blocks of tokens; where there are fewer than threads, each block's features are split as well.
    int64_t block = std::max<int64_t>(kernels.token_block * 1024 / std::max<int64_t>(1024, e.x.d), kernels.token_block / 2);
    int64_t blocks = (n + block - 1) / block;
    int64_t parts = blocks >= threads ? 1 : std::clamp<int64_t>(2 * threads / blocks, 1, std::max<int64_t>(1, d_sae / 256));
    auto task = [&](int64_t b, int64_t p) {
      cpu::Encode part = e;
      part.t0 = n * b / blocks, part.t1 = n * (b + 1) / blocks;
      part.f0 = d_sae * p / parts, part.f1 = d_sae * (p + 1) / parts;
      return part;
    };
    if (parts == 1) {
      cpu::parallel_for(blocks, [&](int64_t i, int) { kernels.encode(task(i, 0)); });
      return;
    }
    // Candidates of each part: keys and ids [parts, n, k], counts [parts, n], for both selections.
    std::vector<int32_t> memory(parts * n * (2 * (e.k + e.k_aux) + 2));
    int32_t* next = memory.data();
    auto take = [&](int64_t size) { return std::exchange(next, next + size); };
    auto with_room = [&](cpu::Codes c) {
      c.keys = take(parts * n * c.k), c.ids = take(parts * n * c.k), c.counts = take(parts * n);
      return c;
    };
    cpu::Codes all[2] = {with_room(e.out), with_room(e.aux)};
    auto part_of = [&](cpu::Codes c, int64_t p) {
      c.keys += p * n * c.k, c.ids += p * n * c.k, c.counts += p * n;
      return c;
    };
    cpu::parallel_for(blocks * parts, [&](int64_t i, int) {
      int64_t p = i % parts;
      cpu::Encode part = task(i / parts, p);
      part.out = part_of(all[0], p), part.aux = part_of(all[1], p);
      kernels.encode(part);
    });
    kernels.merge({all[0], parts, n, 0, n});
    if (e.mask) kernels.merge({all[1], parts, n, 0, n});
  });
}

}  // namespace mlxsae
