#include "ops/encoder_shadow.h"

#include "cpu/eval.h"

namespace mlxsae {

void EncoderShadow::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& out : outputs) cpu::allocate(out);
  cpu::dispatch(
      stream(), inputs, outputs,
      [w = inputs[0].data<float>(), d_sae = int64_t{inputs[0].shape(0)}, d = int64_t{inputs[0].shape(1)},
       type = cpu::shadow_type_of(outputs[0]), out = outputs[0].data<uint16_t>(), columns = outputs[1].data<float>()] {
        cpu::parallel_ranges(
            d_sae, 64, [&](int64_t f0, int64_t f1) { cpu::kernels().shadow(w, d_sae, d, type, out, columns, f0, f1); });
      });
}

mx::Dtype fastest_shadow() {
  auto type = cpu::kernels().shadow_type;
  return type == cpu::ShadowType::i8 ? mx::int8 : type == cpu::ShadowType::i16 ? mx::int16 : mx::bfloat16;
}

}  // namespace mlxsae
