#include "gpu/plans.h"

#include "gpu/csr_encode.h"
#include "gpu/topk_encode.h"

namespace mlxsae::gpu {

const Named::Item& Named::at(const std::string& name) const {
  auto it = items_.find(name);
  if (it == items_.end()) throw std::invalid_argument("[gpu_plan] sizes must hold " + name + " but do not.");
  return it->second;
}

int64_t Named::operator[](const std::string& name) const {
  if (auto* v = std::get_if<int64_t>(&at(name))) return *v;
  throw std::invalid_argument("[gpu_plan] " + name + " must be an integer but got a name.");
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
  };
  return table;
}

const Planned* find_planned(const std::string& op) {
  for (auto& row : planned())
    if (op == row.op) return &row;
  return nullptr;
}

}  // namespace mlxsae::gpu
