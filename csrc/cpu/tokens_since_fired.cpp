#include "ops/tokens_since_fired.h"

#include <cstring>

#include "cpu/eval.h"

namespace mlxsae {

void TokensSinceFired::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  auto& out = outputs[0];
  if (inputs[0].is_donatable())
    out.copy_shared_buffer(inputs[0]);
  else
    cpu::allocate(out);
  cpu::dispatch(stream(), inputs, outputs,
                [from = inputs[0].data<int32_t>(), to = out.data<int32_t>(), d_sae = int64_t{out.shape(0)},
                 code = cpu::code_of(&inputs[1], inputs[2], csr_ ? &inputs.back() : nullptr), n_tokens = n_tokens_] {
                  cpu::check_code("tokens_since_fired", code, d_sae);
                  int64_t entries = code.size();
                  for (int64_t j = 0; j < d_sae; ++j)
                    to[j] = from[j] > INT32_MAX - n_tokens ? INT32_MAX : from[j] + n_tokens;
                  auto mark = [&](auto fired) {
                    for (int64_t i = 0; i < entries; ++i)
                      if (fired(i)) to[code.indices[i]] = 0;
                  };
                  // Not "<= 0" rather than "> 0", so that NaN counts as firing. Half types: the sign bit, and not zero.
                  if (code.type == cpu::Type::f32) {
                    auto* v = static_cast<const float*>(code.values);
                    mark([v](int64_t i) { return !(v[i] <= 0); });
                  } else {
                    auto* v = static_cast<const uint16_t*>(code.values);
                    int nan_above = code.type == cpu::Type::f16 ? 0x7c00 : 0x7f80;
                    mark([v, nan_above](int64_t i) {
                      int magnitude = v[i] & 0x7fff;
                      return magnitude > nan_above || (magnitude != 0 && !(v[i] & 0x8000));
                    });
                  }
                });
}

}  // namespace mlxsae
