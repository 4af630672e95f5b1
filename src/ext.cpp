// The Python module _ext: one m.def per op and no logic. Only mlxsae/ops.py imports it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx/allocator.h"
#include "mlx/version.h"
#include "mlxsae/ops.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

#define ARRAY "mlx.core.array"
#define SHADOW "shadow: tuple[" ARRAY ", " ARRAY "] | None = None"
#define TF32 "tf32: bool = False"
#define OFFSETS "offsets: " ARRAY " | None = None"
#define STREAM "stream: mlx.core.Stream | mlx.core.Device | None = None"

NB_MODULE(_ext, m) {
  nb::module_::import_("mlx.core");  // registers array, Stream and Device in the domain "mlx"
  m.attr("version") = MLXSAE_VERSION;
  m.attr("built_mlx_version") = MLXSAE_BUILT_MLX;
  m.def("probe", [](const mlx::core::array&) {}, nb::sig("def probe(a: " ARRAY ") -> None"));

  using Pair = std::optional<std::pair<mx::array, mx::array>>;
  auto shadow_of = [](const Pair& p) {
    return p ? std::optional<mlxsae::Shadow>({p->first, p->second}) : std::nullopt;
  };
  m.def(
      "topk_encode",
      [shadow_of](const mx::array& x, const mx::array& w_enc, const std::optional<mx::array>& b_enc, int k,
                  const Pair& shadow, bool tf32, mx::StreamOrDevice stream) {
        return mlxsae::topk_encode(x, w_enc, b_enc, k, shadow_of(shadow), tf32, stream);
      },
      "x"_a, "w_enc"_a, "b_enc"_a.none(), nb::kw_only(), "k"_a, "shadow"_a = nb::none(), "tf32"_a = false,
      "stream"_a = nb::none(),
      nb::sig("def topk_encode(x: " ARRAY ", w_enc: " ARRAY ", b_enc: " ARRAY " | None, *, k: int, " SHADOW ", " TF32
              ", " STREAM ") -> tuple[" ARRAY ", " ARRAY "]"));
  m.def("encoder_shadow", &mlxsae::encoder_shadow, "w_enc"_a, nb::kw_only(), "dtype"_a = nb::none(),
        "stream"_a = nb::none(),
        nb::sig("def encoder_shadow(w_enc: " ARRAY ", *, dtype: mlx.core.Dtype | None = None, " STREAM
                ") -> tuple[" ARRAY ", " ARRAY "]"));
  m.def(
      "topk_encode_masked",
      [shadow_of](const mx::array& x, const mx::array& w_enc, const std::optional<mx::array>& b_enc,
                  const mx::array& mask, int k, int k_aux, const Pair& shadow, bool tf32, mx::StreamOrDevice stream) {
        return mlxsae::topk_encode_masked(x, w_enc, b_enc, mask, k, k_aux, shadow_of(shadow), tf32, stream);
      },
      "x"_a, "w_enc"_a, "b_enc"_a.none(), "mask"_a, nb::kw_only(), "k"_a, "k_aux"_a, "shadow"_a = nb::none(),
      "tf32"_a = false, "stream"_a = nb::none(),
      nb::sig("def topk_encode_masked(x: " ARRAY ", w_enc: " ARRAY ", b_enc: " ARRAY " | None, mask: " ARRAY
              ", *, k: int, k_aux: int, " SHADOW ", " TF32 ", " STREAM ") -> list[" ARRAY "]"));
  m.def(
      "batch_topk_encode",
      [shadow_of](const mx::array& x, const mx::array& w_enc, const std::optional<mx::array>& b_enc, int k,
                  const std::optional<mx::array>& hint, const Pair& shadow, bool tf32, mx::StreamOrDevice stream) {
        auto [code, threshold] = mlxsae::batch_topk_encode(x, w_enc, b_enc, k, hint, shadow_of(shadow), tf32, stream);
        return std::vector<mx::array>{code.values, code.indices, code.offsets, threshold};
      },
      "x"_a, "w_enc"_a, "b_enc"_a.none(), nb::kw_only(), "k"_a, "hint"_a = nb::none(), "shadow"_a = nb::none(),
      "tf32"_a = false, "stream"_a = nb::none(),
      nb::sig("def batch_topk_encode(x: " ARRAY ", w_enc: " ARRAY ", b_enc: " ARRAY " | None, *, k: int, hint: " ARRAY
              " | None = None, " SHADOW ", " TF32 ", " STREAM ") -> list[" ARRAY "]"));
  m.def(
      "threshold_encode",
      [](const mx::array& x, const mx::array& w_enc, const std::optional<mx::array>& b_enc, const mx::array& threshold,
         int capacity, mx::StreamOrDevice stream) {
        auto [code, count] = mlxsae::threshold_encode(x, w_enc, b_enc, threshold, capacity, stream);
        return std::vector<mx::array>{code.values, code.indices, code.offsets, count};
      },
      "x"_a, "w_enc"_a, "b_enc"_a.none(), "threshold"_a, nb::kw_only(), "capacity"_a, "stream"_a = nb::none(),
      nb::sig("def threshold_encode(x: " ARRAY ", w_enc: " ARRAY ", b_enc: " ARRAY " | None, threshold: " ARRAY
              ", *, capacity: int, " STREAM ") -> list[" ARRAY "]"));
  m.def("sparse_decode", &mlxsae::sparse_decode, "values"_a, "indices"_a, "w_dec"_a, "b_dec"_a.none(), nb::kw_only(),
        "offsets"_a = nb::none(), "stream"_a = nb::none(),
        nb::sig("def sparse_decode(values: " ARRAY ", indices: " ARRAY ", w_dec: " ARRAY ", b_dec: " ARRAY
                " | None, *, " OFFSETS ", " STREAM ") -> " ARRAY));
  m.def("gather_dot", &mlxsae::gather_dot, "rows"_a, "weight"_a, "indices"_a, nb::kw_only(), "offsets"_a = nb::none(),
        "stream"_a = nb::none(),
        nb::sig("def gather_dot(rows: " ARRAY ", weight: " ARRAY ", indices: " ARRAY ", *, " OFFSETS ", " STREAM
                ") -> " ARRAY));
  m.def("sparse_outer", &mlxsae::sparse_outer, "values"_a, "indices"_a, "rows"_a, nb::kw_only(), "d_sae"_a,
        "offsets"_a = nb::none(), "stream"_a = nb::none(),
        nb::sig("def sparse_outer(values: " ARRAY ", indices: " ARRAY ", rows: " ARRAY ", *, d_sae: int, " OFFSETS
                ", " STREAM ") -> " ARRAY));
  m.def("tokens_since_fired", &mlxsae::tokens_since_fired, "tokens_since_fired"_a, "values"_a, "indices"_a,
        nb::kw_only(), "n_tokens"_a, "offsets"_a = nb::none(), "stream"_a = nb::none(),
        nb::sig("def tokens_since_fired(tokens_since_fired: " ARRAY ", values: " ARRAY ", indices: " ARRAY
                ", *, n_tokens: int, " OFFSETS ", " STREAM ") -> " ARRAY));

  m.def("decode_residual", &mlxsae::decode_residual, "values"_a, "indices"_a, "w_dec"_a, "target"_a, "b_dec"_a.none(),
        nb::kw_only(), "offsets"_a = nb::none(), "stream"_a = nb::none(),
        nb::sig("def decode_residual(values: " ARRAY ", indices: " ARRAY ", w_dec: " ARRAY ", target: " ARRAY
                ", b_dec: " ARRAY " | None, *, " OFFSETS ", " STREAM ") -> tuple[" ARRAY ", " ARRAY "]"));
  m.def(
      "feature_update",
      [shadow_of](const mx::array& x, const mx::array& loss, const std::vector<std::vector<mx::array>>& terms,
                  const std::vector<mx::array>& params, const std::vector<mx::array>& m,
                  const std::vector<mx::array>& v, float lr, float beta1, float beta2, float eps, int step,
                  bool project_decoder, bool normalize_decoder, bool b_dec_to_input, float clip_norm,
                  const std::string& untouched, const Pair& shadow, mx::StreamOrDevice stream) {
        std::vector<mlxsae::UpdateTerm> list;
        for (auto& t : terms) {
          list.push_back({t.at(0), t.at(1), t.at(2), t.at(3)});
          if (t.size() > 4) list.back().offsets = t[4];
        }
        using mlxsae::Untouched;
        auto fate =
            untouched == "step"           ? Untouched::step
            : untouched == "keep_decoder" ? Untouched::keep_decoder
            : untouched == "keep"
                ? Untouched::keep
                : throw std::invalid_argument("[feature_update] untouched must be step, keep_decoder or keep but got " +
                                              untouched + ".");
        return mlxsae::feature_update(
            x, loss, list, params, m, v,
            {lr, beta1, beta2, eps, step, project_decoder, normalize_decoder, b_dec_to_input, clip_norm, fate},
            shadow_of(shadow), stream);
      },
      "x"_a, "loss"_a, "terms"_a, "params"_a, "m"_a, "v"_a, nb::kw_only(), "lr"_a, "beta1"_a, "beta2"_a, "eps"_a,
      "step"_a, "project_decoder"_a, "normalize_decoder"_a, "b_dec_to_input"_a, "clip_norm"_a, "untouched"_a = "step",
      "shadow"_a = nb::none(), "stream"_a = nb::none(),
      nb::sig("def feature_update(x: " ARRAY ", loss: " ARRAY ", terms: list[tuple[" ARRAY
              ", ...]], params: list[" ARRAY "], m: list[" ARRAY "], v: list[" ARRAY
              "], *, lr: float, beta1: float, beta2: float, eps: float, step: int, project_decoder: bool, "
              "normalize_decoder: bool, b_dec_to_input: bool, clip_norm: float, untouched: str = 'step', " SHADOW
              ", " STREAM ") -> list[" ARRAY "]"));

  m.def(
      "adam_catch_up",
      [](const mx::array& w, const mx::array& m, const mx::array& v, const mx::array& last_step, const mx::array& rows,
         const std::vector<float>& lr, float beta1, float beta2, float eps, int step, bool normalize,
         mx::StreamOrDevice stream) {
        return mlxsae::adam_catch_up(w, m, v, last_step, rows, {lr, beta1, beta2, eps, step, normalize}, stream);
      },
      "w"_a, "m"_a, "v"_a, "last_step"_a, "rows"_a, nb::kw_only(), "lr"_a, "beta1"_a, "beta2"_a, "eps"_a, "step"_a,
      "normalize"_a, "stream"_a = nb::none(),
      nb::sig("def adam_catch_up(w: " ARRAY ", m: " ARRAY ", v: " ARRAY ", last_step: " ARRAY ", rows: " ARRAY
              ", *, lr: list[float], beta1: float, beta2: float, eps: float, step: int, normalize: bool, " STREAM
              ") -> list[" ARRAY "]"));

  m.def("products_are_tf32", &mlxsae::products_are_tf32, "device"_a,
        nb::sig("def products_are_tf32(device: mlx.core.Device) -> bool"));
  m.def("gpu_plan", &mlxsae::gpu_plan, "op"_a, "sizes"_a, nb::kw_only(), "gpu"_a = "",
        nb::sig("def gpu_plan(op: str, sizes: dict[str, int | float | str], *, gpu: str = '') -> str"));
  m.def("gpu_plan_of", &mlxsae::gpu_plan_of, "result"_a, nb::kw_only(), "gpu"_a = "",
        nb::sig("def gpu_plan_of(result: " ARRAY ", *, gpu: str = '') -> str"));
  m.def("op_names", &mlxsae::op_names, nb::sig("def op_names() -> list[str]"));
  m.def("kernel_for", &mlxsae::kernel_for, "op"_a, "device"_a,
        nb::sig("def kernel_for(op: str, device: mlx.core.Device) -> str"));
  m.def("kernels_enabled", &mlxsae::kernels_enabled, nb::sig("def kernels_enabled() -> bool"));
  m.def("enable_kernels", &mlxsae::enable_kernels, "enabled"_a, nb::sig("def enable_kernels(enabled: bool) -> None"));
  m.def("num_threads", &mlxsae::num_threads, nb::sig("def num_threads() -> int"));
  m.def("set_num_threads", &mlxsae::set_num_threads, "n"_a, nb::sig("def set_num_threads(n: int) -> None"));
  m.def(
      "unwritten",
      [](const std::vector<int>& shape, mx::Dtype dtype) {
        size_t size = mx::size_of(dtype);
        for (int n : shape) size *= static_cast<unsigned>(n);
        return mx::array(mx::allocator::malloc(size), {shape.begin(), shape.end()}, dtype);
      },
      "shape"_a, "dtype"_a, nb::sig("def unwritten(shape: tuple[int, ...], dtype: mlx.core.Dtype) -> " ARRAY));
}
