// The kernels of one instruction set (-DISA=...) on fixed problems. Prints hashes of their bits, which must be the same
// on every set with fused multiply-add, and counts the rows whose selection double precision contradicts.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"

using namespace mlxsae::cpu;
namespace mlxsae::cpu::ISA {
const Kernels& table();
}
void mlxsae::cpu::throw_bad_alloc() { std::abort(); }

static uint64_t state = 1;
static uint32_t random_bits() {
  return static_cast<uint32_t>((state = state * 6364136223846793005u + 1442695040888963407u) >> 33);
}
static float uniform() { return static_cast<float>(random_bits()) / 1073741824.0f - 1.0f; }

template <class T>
static uint64_t hash(const std::vector<T>& v) {
  uint64_t h = 1469598103934665603u;
  auto* bytes = reinterpret_cast<const unsigned char*>(v.data());
  for (size_t i = 0; i < v.size() * sizeof(T); ++i) h = (h ^ bytes[i]) * 1099511628211u;
  return h;
}

int main() {
  const Kernels& kernels = mlxsae::cpu::ISA::table();
  for (auto [n, d, d_sae, k] :
       {std::array<int, 4>{5, 33, 700, 9}, {70, 100, 5000, 16}, {33, 2100, 300, 7}, {1, 64, 64, 64}}) {
    std::vector<float> x(n * d), w(d_sae * d), bias(d_sae), values(n * k);
    std::vector<uint32_t> indices(n * k);
    for (auto* v : {&x, &w, &bias}) std::generate(v->begin(), v->end(), uniform);
    Encode e{};
    e.x = {x.data(), Type::f32, n, d};
    e.w = {w.data(), Type::f32, d_sae, d};
    e.bias = bias.data();
    e.k = k, e.t1 = n, e.f1 = d_sae;
    e.out = {k, values.data(), Type::f32, indices.data(), nullptr, nullptr, nullptr, 0};
    kernels.encode(e);
    int wrong = 0;
    for (int t = 0; t < n; ++t) {
      double lowest = 1e30, highest_left = -1e30;
      for (int j = 0; j < d_sae; ++j) {
        double z = bias[j];
        for (int c = 0; c < d; ++c) z += static_cast<double>(x[t * d + c]) * w[j * d + c];
        bool chosen = std::find(&indices[t * k], &indices[t * k] + k, static_cast<uint32_t>(j)) != &indices[t * k] + k;
        (chosen ? lowest : highest_left) = chosen ? std::min(lowest, z) : std::max(highest_left, z);
      }
      wrong += highest_left > lowest + 1e-4;
    }
    std::printf("wrong %d values %016llx indices %016llx", wrong, static_cast<unsigned long long>(hash(values)),
                static_cast<unsigned long long>(hash(indices)));

    std::vector<uint16_t> w16(d_sae * d);
    for (auto& v : w16) v = static_cast<uint16_t>(0x3800 + random_bits() % 0x400);
    for (Type type : {Type::f16, Type::bf16}) {
      e.w = {w16.data(), type, d_sae, d};
      kernels.encode(e);
      std::printf(" %016llx", static_cast<unsigned long long>(hash(indices)));
    }
    std::vector<float> out(n * d);
    kernels.decode({values.data(), Type::f32, indices.data(), nullptr, n, k}, {w.data(), Type::f32, d_sae, d}, nullptr,
                   Type::f32, out.data(), Type::f32, 0, n);
    std::printf(" decode %016llx\n", static_cast<unsigned long long>(hash(out)));
  }
}
