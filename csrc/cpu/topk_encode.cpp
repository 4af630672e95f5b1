#include "ops/topk_encode.h"

#include <algorithm>

#include "cpu/eval.h"

namespace mlxsae {

void TopKEncode::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) cpu::allocate(out);
  cpu::Encode e{};
  e.x = cpu::rows_of(inputs[0]);
  e.w = cpu::rows_of(inputs[1]);
  e.bias = inputs.size() > 2 ? inputs[2].data<float>() : nullptr;
  e.k = k_;
  e.values = outputs[0].data<char>();
  e.values_type = cpu::type_of(outputs[0]);
  e.indices = outputs[1].data<uint32_t>();

  cpu::dispatch(stream(), inputs, outputs, [e] {
    const auto& kernels = cpu::kernels();
    int64_t n = e.x.n, d_sae = e.w.n, threads = cpu::num_threads();
    if (n == 0) return;
    // Blocks of tokens; where there are fewer than threads, each block's features are split as well.
    int64_t block = std::max<int64_t>(kernels.token_block * 1024 / std::max<int64_t>(1024, e.x.d), 64);
    int64_t blocks = (n + block - 1) / block;
    int64_t parts = blocks >= threads ? 1 : std::clamp<int64_t>(2 * threads / blocks, 1, std::max<int64_t>(1, d_sae / 256));
    if (parts == 1) {
      cpu::parallel_for(blocks, [&](int64_t i, int) {
        cpu::Encode task = e;
        task.t0 = n * i / blocks, task.t1 = n * (i + 1) / blocks, task.f0 = 0, task.f1 = d_sae;
        kernels.encode(task);
      });
      return;
    }
    std::vector<int32_t> candidates(2 * parts * n * e.k + parts * n);
    int32_t *keys = candidates.data(), *ids = keys + parts * n * e.k, *counts = ids + parts * n * e.k;
    cpu::parallel_for(blocks * parts, [&](int64_t i, int) {
      int64_t b = i / parts, p = i % parts;
      cpu::Encode task = e;
      task.t0 = n * b / blocks, task.t1 = n * (b + 1) / blocks;
      task.f0 = d_sae * p / parts, task.f1 = d_sae * (p + 1) / parts;
      task.keys = keys + p * n * e.k, task.ids = ids + p * n * e.k, task.counts = counts + p * n;
      kernels.encode(task);
    });
    cpu::Merge merge{keys, ids, counts, parts, n, e.k, 0, n, e.values, e.values_type, e.indices};
    kernels.merge(merge);
  });
}

}  // namespace mlxsae
