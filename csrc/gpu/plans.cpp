#include "gpu/plans.h"

#include "gpu/adam_catch_up.h"
#include "gpu/csr_encode.h"
#include "gpu/encoder_shadow.h"
#include "gpu/feature_update.h"
#include "gpu/gather_dot.h"
#include "gpu/sparse_decode.h"
#include "gpu/sparse_outer.h"
#include "gpu/tokens_since_fired.h"
#include "gpu/topk_encode.h"

namespace mlxsae::gpu {

const Named::Item& Named::at(const std::string& name) const {
  auto it = items_.find(name);
  if (it == items_.end()) throw std::invalid_argument("[gpu_plan] sizes must hold " + name + " but do not.");
  return it->second;
}

int64_t Named::operator[](const std::string& name) const {
  if (auto* v = std::get_if<int64_t>(&at(name))) return *v;
  throw std::invalid_argument("[gpu_plan] " + name + " must be an integer but is not.");
}

float Named::real(const std::string& name) const {
  auto& item = at(name);
  if (auto* v = std::get_if<double>(&item)) return static_cast<float>(*v);
  if (auto* v = std::get_if<int64_t>(&item)) return static_cast<float>(*v);
  throw std::invalid_argument("[gpu_plan] " + name + " must be a number but got a name.");
}

Type Named::type(const std::string& name) const {
  if (auto* text = std::get_if<std::string>(&at(name)))
    for (Type t : {Type::f32, Type::f16, Type::bf16})
      if (*text == metal_name(t)) return t;
  throw std::invalid_argument("[gpu_plan] " + name + " must be float, half or bfloat but is not.");
}

namespace {

EncodeSizes encode_sizes(const Named& a) {
  return {a["n"],          a["d_in"],        a["d_sae"],        a.type("type"),
          a["exact"] != 0, a["shadow"] != 0, a["aligned"] != 0, a["aligned_bias"] != 0};
}

/** Sizes n, k, room, compressed and the type of values; of an op's codes after the first with the suffix _1 and so on.
 */
CodeSize code_of(const Named& s, const std::string& suffix = "", bool typed = true) {
  return {s["n"], s["k" + suffix], s["room" + suffix], s["compressed" + suffix] != 0,
          typed ? s.type("values" + suffix) : Type::f32};
}

Plan plan_feature_update(const Named& s, const Device&) {
  FeatureUpdateSize size{s["n"], s["d_in"],        s["d_out"],        s["d_sae"],
                         {},     s["shadow"] != 0, s["aligned"] != 0, s.type("moments")};
  size.terms.push_back(code_of(s, "", false));
  for (int64_t q = 1; q < s["terms"]; ++q) size.terms.push_back(code_of(s, '_' + std::to_string(q), false));
  return feature_update(size,
                        {s.real("beta1"), s.real("beta2"), s.real("eps"), s.real("step_size"), s.real("inv_sqrt_bias"),
                         s["project"] != 0, s["normalize"] != 0, s["through_input"] != 0, s["keep_encoder"] != 0,
                         s["keep_decoder"] != 0, s.real("clip_norm"), static_cast<uint32_t>(s["step"])});
}

}  // namespace

const std::vector<Planned>& planned() {
  static const std::vector<Planned> table{
      {"topk_encode",
       {"encode_products", "topk_encode"},
       [](const Named& a, const Device& device) { return topk_encode({encode_sizes(a), a["k"], a["k_aux"]}, device); }},
      {"batch_topk_encode",
       {"encode_products", "csr_encode"},
       [](const Named& a, const Device& device) { return batch_topk_encode({encode_sizes(a), a["k"]}, device); }},
      {"threshold_encode",
       {"encode_products", "csr_encode"},
       [](const Named& a, const Device& device) { return threshold_encode({encode_sizes(a), a["capacity"]}, device); }},
      {"sparse_decode",
       {"sparse_decode"},
       [](const Named& s, const Device&) {
         auto bias = s["bias"] ? std::optional(s.type("bias_type")) : std::nullopt;
         return sparse_decode(code_of(s), s["d"], s["d_sae"], s.type("w"), bias, s["aligned"] != 0);
       }},
      {"decode_residual",
       {"sparse_decode"},
       [](const Named& s, const Device&) {
         return decode_residual(code_of(s, "", false), s["d"], s["d_sae"], s["bias"] != 0, s["aligned"] != 0);
       }},
      {"gather_dot",
       {"gather_dot"},
       [](const Named& s, const Device&) {
         return gather_dot(code_of(s, "", false), s["d"], s["d_sae"], s.type("rows"), s.type("w"), s["aligned"] != 0);
       }},
      {"sparse_outer",
       {"code_sort", "sparse_outer"},
       [](const Named& s, const Device&) {
         return sparse_outer(code_of(s), s["d"], s["d_sae"], s.type("rows"), s["aligned"] != 0);
       }},
      {"tokens_since_fired",
       {"tokens_since_fired"},
       [](const Named& s, const Device&) {
         return tokens_since_fired(code_of(s), s["d_sae"], static_cast<int32_t>(s["n_tokens"]));
       }},
      {"encoder_shadow",
       {"encoder_shadow"},
       [](const Named& s, const Device&) { return encoder_shadow(s["d_sae"], s["d"], s["aligned"] != 0); }},
      {"feature_update", {"code_sort", "feature_update"}, plan_feature_update},
      {"adam_catch_up",
       {"adam_catch_up"},
       [](const Named& s, const Device&) {
         return adam_catch_up(
             {s["d_sae"], s["d"], s["steps"], s.type("moments"), s["aligned"] != 0},
             {s.real("beta1"), s.real("beta2"), s.real("eps"), static_cast<int32_t>(s["step"]), s["normalize"] != 0});
       }},
  };
  return table;
}

const Planned* find_planned(const std::string& op) {
  for (auto& row : planned())
    if (op == row.op) return &row;
  return nullptr;
}

}  // namespace mlxsae::gpu
