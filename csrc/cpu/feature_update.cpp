#include "ops/feature_update.h"

#include <cmath>

#include "cpu/dense.h"

namespace mlxsae {

void FeatureUpdate::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  let_go(inputs, outputs);
  size_t n_terms = csr_.size(), first = place_of_offsets(csr_, n_terms);
  std::vector<cpu::InPlace> kept;
  for (size_t i = 0; i < outputs.size(); ++i)
    if (i == 12)
      cpu::allocate(outputs[i]);  // grad_norm
    else
      kept.emplace_back(inputs[first + i - (i > 12)], outputs[i]);

  struct TermData {
    const float* residual;
    cpu::Code code;
    const float* scale;
  };
  std::vector<TermData> terms;
  for (size_t q = 0; q < n_terms; ++q) {
    const auto* offsets = csr_[q] ? &inputs[place_of_offsets(csr_, q)] : nullptr;
    terms.push_back({inputs[2 + 4 * q].data<float>(), cpu::code_of(&inputs[3 + 4 * q], inputs[4 + 4 * q], offsets),
                     inputs[5 + 4 * q].data<float>()});
  }
  auto param = [&](int i) {
    return cpu::Param{outputs[i].data<float>(), outputs[4 + i].data<void>(), outputs[8 + i].data<void>(),
                      outputs[4 + i].dtype() == mx::float32 ? cpu::Type::f32 : cpu::Type::bf16,
                      noise_seed(options_.step, i)};
  };

  cpu::dispatch(
      stream(), inputs, outputs,
      [kept, terms, x = inputs[0].data<float>(), loss = inputs[1].data<float>(), n = int64_t{inputs[0].shape(0)},
       d_in = int64_t{inputs[0].shape(1)}, d_sae = int64_t{outputs[0].shape(0)}, d_out = int64_t{outputs[2].shape(1)},
       w_enc = param(0), b_enc = param(1), w_dec = param(2), b_dec = param(3), norm_out = outputs[12].data<float>(),
       w16 = outputs.size() > 13 ? outputs[13].data<uint16_t>() : nullptr,
       columns = outputs.size() > 13 ? outputs[14].data<float>() : nullptr,
       shadow_type = outputs.size() > 13 ? cpu::shadow_type_of(outputs[13]) : cpu::ShadowType::bf16, o = options_] {
        for (auto& array : kept) array.begin();
        *norm_out = NAN;
        if (!std::isfinite(*loss)) return;  // the step is skipped: parameters and moments stay what they were

        const auto& kernels = cpu::kernels();
        std::vector<cpu::Grouped> grouped;
        std::vector<cpu::Term> walk;
        for (auto& t : terms) {
          cpu::check_code("feature_update", t.code, d_sae);
          grouped.emplace_back(t.code, d_sae, true);
          walk.push_back({grouped.back().view(), t.residual, *t.scale});
        }
        // A fixed number of ranges, so that sums over them do not depend on the number of threads.
        auto cuts = grouped[0].ranges(64, 3.0);
        cpu::DenseTerms dense(walk, x, n, d_in, d_out, d_sae);
        int64_t ranges = static_cast<int64_t>(cuts.size()) - 1, parts = ranges + dense.parts();
        std::vector<float> through(o.b_dec_to_input ? parts * d_in : 0, 0.0f);
        std::vector<double> squares(parts, 0.0);

        cpu::Update u{};
        u.x = x, u.d_in = d_in, u.d_out = d_out;
        u.terms = walk.data(), u.n_terms = static_cast<int>(walk.size());
        u.w_enc = w_enc, u.b_enc = b_enc, u.w_dec = w_dec;
        auto [step_size, inv_sqrt_bias] = bias_correction(o.lr, o.beta1, o.beta2, o.step);
        u.adam = {o.beta1, o.beta2, o.eps, step_size, inv_sqrt_bias};
        u.keep_encoder = o.untouched == Untouched::keep, u.keep_decoder = o.untouched != Untouched::step;
        u.project = o.project_decoder, u.normalize = o.normalize_decoder;
        u.clip = 1;
        u.w16 = w16, u.columns = columns, u.shadow_type = shadow_type, u.d_sae = d_sae;
        u.apart = dense.apart();
        auto pass = [&](bool norms_only, bool sums) {
          u.norms_only = norms_only;
          auto part_of = [&](int64_t i) {
            cpu::Update part = u;
            part.through_input = sums && o.b_dec_to_input ? through.data() + i * d_in : nullptr;
            part.square = sums ? &squares[i] : nullptr;
            return part;
          };
          cpu::parallel_for(ranges, [&](int64_t i, int) {
            cpu::Update part = part_of(i);
            part.f0 = cuts[i], part.f1 = cuts[i + 1];
            kernels.update(part);
          });
          if (dense.any()) dense.update(u, n, [&](int64_t i) { return part_of(ranges + i); });
        };
        bool clip = o.clip_norm > 0;
        pass(clip, true);

        std::vector<double> sum(d_out, 0.0);  // db_dec = scale * sum_t residual_t - sum_j db_enc[j] w_enc[j]
        cpu::parallel_ranges(d_out, 64, [&](int64_t c0, int64_t c1) {
          for (int64_t t = 0; t < n; ++t)
            for (int64_t c = c0; c < c1; ++c) sum[c] += terms[0].residual[t * d_out + c];
          for (int64_t c = c0; c < c1; ++c) sum[c] *= *terms[0].scale;
          for (int64_t i = 0; i < parts && o.b_dec_to_input; ++i)
            for (int64_t c = c0; c < c1; ++c) sum[c] -= through[i * d_in + c];
        });
        std::vector<float> g(sum.begin(), sum.end());
        double square = 0;
        for (double q : squares) square += q;
        for (double v : sum) square += v * v;
        double norm = std::sqrt(square);
        *norm_out = static_cast<float>(norm);
        if (clip) {
          u.clip = norm > o.clip_norm ? static_cast<float>(o.clip_norm / norm) : 1.0f;
          pass(false, false);
        }
        kernels.adam(b_dec, g.data(), u.clip, u.adam, d_out);
      });
}

}  // namespace mlxsae
