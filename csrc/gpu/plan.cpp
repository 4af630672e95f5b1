#include "gpu/plan.h"

#include <cmath>
#include <sstream>
#include <type_traits>

namespace mlxsae::gpu {

const char* metal_name(Type t) {
  switch (t) {
    case Type::f32:
      return "float";
    case Type::f16:
      return "half";
    case Type::bf16:
      return "bfloat";
    case Type::i32:
      return "int";
    case Type::u32:
      return "uint";
    case Type::i64:
      return "long";
    case Type::boolean:
      return "bool";
  }
  return "";
}

namespace {

template <class List, class Write>
void list(std::ostream& out, const List& items, Write&& write) {
  out << '[';
  for (size_t i = 0; i < items.size(); ++i) {
    if (i) out << ',';
    write(items[i]);
  }
  out << ']';
}

void text(std::ostream& out, const std::string& s) { out << '"' << s << '"'; }  // names hold nothing to escape

void constant(std::ostream& out, const Constant& c) {
  static const char* types[] = {"bool", "int", "uint", "long", "float", "uint"};
  out << '[' << c.index << ",\"" << types[c.value.index()] << "\",";
  std::visit(
      [&](const auto& v) {
        if constexpr (std::is_same_v<std::decay_t<decltype(v)>, Words>) {
          list(out, v, [&](uint32_t w) { out << w; });
        } else if constexpr (std::is_same_v<std::decay_t<decltype(v)>, float>) {
          std::isfinite(v) ? out << v : out << (v > 0 ? "Infinity" : v < 0 ? "-Infinity" : "NaN");
        } else {
          out << +v;
        }
      },
      c.value);
  out << ']';
}

void size(std::ostream& out, const Size& s) { out << '[' << s.x << ',' << s.y << ',' << s.z << ']'; }

struct WriteStep {
  std::ostream& out;

  void operator()(const Launch& l) const {
    out << "{\"kernel\":";
    text(out, l.kernel);
    out << ",\"library\":";
    text(out, l.library);
    out << ",\"groups\":";
    size(out, l.groups);
    out << ",\"threads\":";
    size(out, l.threads);
    out << ",\"bindings\":";
    list(out, l.bindings, [&](const Binding& b) {
      out << '[' << b.index << ',' << b.buffer << ',' << b.offset << ',' << (b.write ? "true" : "false") << ']';
    });
    out << ",\"arguments\":";
    list(out, l.arguments, [&](const Constant& c) { constant(out, c); });
    out << ",\"constants\":";
    list(out, l.constants, [&](const Constant& c) { constant(out, c); });
    out << '}';
  }
  void operator()(const Matmul& m) const {
    out << "{\"matmul\":[" << m.a << ',' << m.b << ',' << m.out << "],\"n\":" << m.n << ",\"m\":" << m.m
        << ",\"d\":" << m.d << ",\"first\":" << m.first << '}';
  }
};

}  // namespace

std::string Plan::json() const {
  static const char* roles[] = {"input", "output", "temporary"};
  std::ostringstream out;
  out.precision(9);
  out << "{\"buffers\":";
  list(out, buffers, [&](const Buffer& b) {
    out << "{\"name\":";
    text(out, b.name);
    out << ",\"role\":\"" << roles[static_cast<int>(b.role)] << "\",\"type\":\"" << metal_name(b.type)
        << "\",\"size\":" << b.size << ",\"donor\":" << b.donor << '}';
  });
  out << ",\"steps\":";
  list(out, steps, [&](const Step& s) { std::visit(WriteStep{out}, s); });
  out << '}';
  return out.str();
}

}  // namespace mlxsae::gpu
