#pragma once
// What a GPU has to do for one op, as plain data: buffers, kernel launches and matrix products, in order. Functions in
// this folder make plans from sizes, types and a row of the table of GPUs; they know neither MLX nor Metal, so that one
// plan is what the Metal adapter executes on a Mac (csrc/metal) and what the tests execute on any machine
// (tests/metal).

#include <bit>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace mlxsae::gpu {

enum class Type { f32, f16, bf16, i32, u32, i64, boolean };

inline int64_t size_of(Type t) {
  switch (t) {
    case Type::boolean:
      return 1;
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::i64:
      return 8;
    default:
      return 4;
  }
}

/** The name of a type in Metal, as in the names of kernels: sparse_decode_bfloat. */
const char* metal_name(Type t);

/** Bytes of one access of a thread: rows of whole such pieces, from addresses that are multiples of it, are read fast.
 */
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kSimd = 32;  // threads that Apple's GPUs run in step

enum class Role { input, output, temporary };

/** A row-contiguous array. Inputs and outputs come in the order of the primitive's. */
struct Buffer {
  std::string name;
  Role role;
  Type type;
  int64_t size;    // elements
  int donor = -1;  // an output that may lie in the memory of this input, where nobody else holds it
};

/** A buffer at a kernel's argument, from an element on; -1: none, the kernel never touches this argument. */
struct Binding {
  int index, buffer;
  int64_t offset;
  bool write;
};

/** A number; or the words of a struct of 32-bit numbers. */
using Words = std::vector<uint32_t>;
using Value = std::variant<bool, int32_t, uint32_t, int64_t, float, Words>;

/** A value at a kernel's argument, or a function constant. */
struct Constant {
  int index;
  Value value;
};

struct Size {
  int64_t x = 1, y = 1, z = 1;
};

/** One kernel of metal/<library>.metal. */
struct Launch {
  std::string library, kernel;
  Size groups, threads;  // threadgroups of the grid, threads of a threadgroup
  std::vector<Binding> bindings = {};
  std::vector<Constant> arguments = {};
  std::vector<Constant> constants = {};  // function constants

  Launch& read(int index, int buffer, int64_t offset = 0) {
    bindings.push_back({index, buffer, offset, false});
    return *this;
  }
  /** Written, or read and written. */
  Launch& write(int index, int buffer, int64_t offset = 0) {
    bindings.push_back({index, buffer, offset, true});
    return *this;
  }
  Launch& argument(int index, Value v) {
    arguments.push_back({index, v});
    return *this;
  }
  Launch& constant(int index, Value v) {
    constants.push_back({index, v});
    return *this;
  }
};

/** out [n, m] = a [n, d] b[first : first + m]^T by the framework's own product; all three of one type. */
struct Matmul {
  int a, b, out;
  int64_t n, m, d, first;
};

using Step = std::variant<Launch, Matmul>;

struct Plan {
  std::vector<Buffer> buffers;
  std::vector<Step> steps;

  int input(std::string name, Type type, int64_t size) { return add({std::move(name), Role::input, type, size}); }
  int output(std::string name, Type type, int64_t size, int donor = -1) {
    return add({std::move(name), Role::output, type, size, donor});
  }
  int temporary(std::string name, Type type, int64_t size) {
    return add({std::move(name), Role::temporary, type, size});
  }
  /** A launch to be bound by read(), write(), argument() and constant(). */
  Launch& launch(std::string library, std::string kernel, Size groups, Size threads) {
    steps.emplace_back(Launch{std::move(library), std::move(kernel), groups, threads});
    return std::get<Launch>(steps.back());
  }
  void matmul(Matmul m) { steps.emplace_back(m); }

  /** The plan as JSON. */
  std::string json() const;

 private:
  int add(Buffer b) {
    buffers.push_back(std::move(b));
    return static_cast<int>(buffers.size()) - 1;
  }
};

/** A float as a word of a struct. */
inline uint32_t word(float v) { return std::bit_cast<uint32_t>(v); }
inline uint32_t word(int64_t v) { return static_cast<uint32_t>(v); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mlxsae::gpu
