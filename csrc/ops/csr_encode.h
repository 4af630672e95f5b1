#pragma once

#include "ops/common.h"

namespace mlxsae {

/**
 * An encoder that gives compressed rows. Inputs x, w_enc, b_enc (float32) and what the rule needs; outputs values,
 * indices, offsets and one number. Its derivative is that of the entries that are kept.
 */
class CsrEncode : public FusedPrimitive {
 public:
  using FusedPrimitive::FusedPrimitive;

  Arrays jvp(const Arrays&, const Arrays&, const std::vector<int>&) override;
  Arrays vjp(const Arrays&, const Arrays&, const std::vector<int>&, const Arrays&) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays&, const std::vector<int>&) override;

 protected:
  /** The op on other inputs with this primitive's options. */
  virtual Arrays again(const Arrays& inputs) = 0;
};

/** The op's result with derivatives for the values only. */
Arrays only_values(Arrays out, mx::Stream s);

/** Ranges of rows for which [rows, d_sae] stays below 2^22 elements. */
std::vector<std::pair<int, int>> row_chunks(int n, int d_sae);

/** Float32 pre-activations [end - begin, d_sae] of the rows [begin, end), with inputs as of CsrEncode. */
mx::array pre_acts(const Arrays& in, int begin, int end, mx::Stream s);

/** offsets [n + 1] int64 from the numbers of entries of each row. */
mx::array offsets_from(const mx::array& counts, mx::Stream s);

}  // namespace mlxsae
