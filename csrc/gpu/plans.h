#pragma once
// Every op that has a plan, by name: which libraries its kernels are in, and its plan from sizes that have names.

#include <map>

#include "gpu/device.h"
#include "gpu/plan.h"

namespace mlxsae::gpu {

/** Sizes, switches, numbers and types ("float", "half", "bfloat") by name, as a caller without C++ types gives them. */
class Named {
 public:
  using Item = std::variant<int64_t, double, std::string>;
  explicit Named(std::map<std::string, Item> items) : items_(std::move(items)) {}

  int64_t operator[](const std::string& name) const;
  int64_t get(const std::string& name, int64_t otherwise) const {
    return items_.count(name) ? (*this)[name] : otherwise;
  }
  float real(const std::string& name) const;
  Type type(const std::string& name) const;

 private:
  const Item& at(const std::string& name) const;
  std::map<std::string, Item> items_;
};

struct Planned {
  const char* op;
  std::vector<const char*> libraries;  // files metal/<library>.metal
  Plan (*plan)(const Named&, const Device&);
};

const std::vector<Planned>& planned();

/** The op's row, or null where it has no plan. */
const Planned* find_planned(const std::string& op);

}  // namespace mlxsae::gpu
