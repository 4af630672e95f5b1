#include "cpu/dense.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mlxsae::cpu {
namespace {

constexpr int64_t kTile = 12;              // a multiple of the rows of every tile
constexpr int64_t kBlockFloats = 4 << 20;  // 16 MiB: what is packed at a time of weights, tokens and gradients

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t panels_of(int64_t columns) { return (columns + kernels().panel - 1) / kernels().panel; }

/** As many whole groups of `group` items of `floats` each as fit a block. */
int64_t block_of(int64_t n, int64_t floats, int64_t group) {
  return std::min(n, std::max(group, kBlockFloats / std::max<int64_t>(1, floats) / group * group));
}

/** The product, shared out by panels and groups of rows. */
void multiply(const std::vector<std::pair<Product, int64_t>>& products) {
  constexpr int64_t kRows = 240;  // a multiple of every tile
  struct Task {
    const Product* of;
    int64_t i0, i1, panel;
  };
  std::vector<Task> tasks;
  for (auto& [p, rows] : products)
    for (int64_t q = 0; q < panels_of(p.columns); ++q)
      for (int64_t i = 0; i < rows; i += kRows) tasks.push_back({&p, i, std::min(rows, i + kRows), q});
  parallel_for(static_cast<int64_t>(tasks.size()), [&](int64_t i, int) {
    const Task& t = tasks[i];
    kernels().product(*t.of, t.i0, t.i1, t.panel);
  });
}

bool all_finite(const float* numbers, int64_t n) {
  std::atomic<bool> finite = true;
  parallel_ranges(n, 1 << 16, [&](int64_t begin, int64_t end) {
    constexpr uint32_t exponent = 0x7f800000;
    bool here = true;
    for (int64_t i = begin; i < end; ++i) here &= (std::bit_cast<uint32_t>(numbers[i]) & exponent) != exponent;
    if (!here) finite = false;
  });
  return finite;
}

}  // namespace

Workspace::~Workspace() { std::free(data_); }

float* Workspace::get(int64_t floats) {
  constexpr int64_t page = 2 << 20;
  int64_t size = round_up(floats * int64_t{sizeof(float)} + 64, page);
  if (size > size_) {
    std::free(data_);
    data_ = std::aligned_alloc(page, size);
    size_ = data_ ? size : 0;
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data_, size, MADV_HUGEPAGE);
#endif
  }
  return static_cast<float*>(data_);
}

Workspace& workspace() {
  static thread_local Workspace own;
  return own;
}

bool dense_residual(const Code& code, const float* w, const float* bias, const float* target, int64_t d_sae, int64_t d,
                    float* residual, float* square) {
  int64_t n = code.n, nnz = code.size();
  if (code.type != Type::f32 || !code.values || !dense_pays(n, 32, nnz)) return false;
  const auto* values = static_cast<const float*>(code.values);
  auto row = [&](int64_t t) {
    return code.offsets ? std::pair{code.offsets[t], code.offsets[t + 1]} : std::pair{t * code.k, (t + 1) * code.k};
  };
  // Each part marks for itself: a shared line would go back and forth.
  int64_t parts = std::min(num_threads(), 8);
  std::vector<uint8_t> used(parts * d_sae);
  std::atomic<int64_t> entries = 0;
  parallel_for(parts, [&](int64_t p, int) {
    int64_t found = 0;
    for (int64_t i = row(n * p / parts).first, end = row(n * (p + 1) / parts - 1).second; i < end; ++i) {
      bool there = values[i] != 0;  // as likely as not, so nothing branches on it
      found += there;
      used[p * d_sae + code.indices[i]] |= there;
    }
    entries += found;
  });
  std::vector<uint32_t> features;
  for (int64_t j = 0; j < d_sae; ++j) {
    uint8_t any = 0;
    for (int64_t p = 0; p < parts; ++p) any |= used[p * d_sae + j];
    if (any) features.push_back(static_cast<uint32_t>(j));
  }
  auto count = static_cast<int64_t>(features.size());
  if (!dense_pays(n, count, entries)) return false;

  const auto& k = kernels();
  int64_t panels = panels_of(d), per_feature = panels * k.panel;
  int64_t block = block_of(count, per_feature, k.panel);
  // As many chunks for each thread, of whole tiles; a matrix of a chunk and a panel share the second-level cache.
  constexpr int64_t kTokens = 96;
  int64_t tokens = std::max(kTile, n / round_up((n + kTokens - 1) / kTokens, num_threads()) / kTile * kTile);
  int64_t chunks = (n + tokens - 1) / tokens;
  float* packed = workspace().get(block * per_feature + num_threads() * tokens * block);
  std::vector<int32_t> place(d_sae, -1);
  for (int64_t b = 0; b < count; b += block) {
    int64_t m = std::min(block, count - b);
    const uint32_t* which = features.data() + b;
    for (int64_t i = 0; i < m; ++i) place[which[i]] = static_cast<int32_t>(i);
    std::atomic<bool> finite = true;
    parallel_for(panels, [&](int64_t p, int) {
      if (!k.panel_of(w, which, m, d, packed, p)) finite = false;
    });
    if (!finite) return false;  // what is not used adds nothing: zero times infinity would
    parallel_for(chunks, [&](int64_t i, int worker) {
      int64_t t0 = i * tokens, t1 = std::min(n, t0 + tokens);
      float* matrix = packed + block * per_feature + worker * tokens * block;
      std::memset(matrix, 0, (t1 - t0) * m * sizeof(float));
      for (int64_t t = t0; t < t1; ++t) {
        auto [begin, end] = row(t);
        for (int64_t e = begin; e < end; ++e)
          if (int32_t at = place[code.indices[e]]; at >= 0) matrix[(t - t0) * m + at] += values[e];
        if (b == 0 && bias)
          std::memcpy(residual + t * d, bias, d * sizeof(float));
        else if (b == 0)
          std::memset(residual + t * d, 0, d * sizeof(float));
      }
      Product product{matrix, m, nullptr, packed, m, d, residual + t0 * d, d};
      for (int64_t p = 0; p < panels; ++p) k.product(product, 0, t1 - t0, p);
      if (b + m == count) k.subtract(target, d, residual, square, t0, t1);
    });
    for (int64_t i = 0; i < m; ++i) place[which[i]] = -1;
  }
  return true;
}

DenseTerms::DenseTerms(const std::vector<Term>& terms, const float* x, int64_t n, int64_t d_in, int64_t d_out,
                       int64_t d_sae) {
  apart_.assign(d_sae, 0);
  // A matrix has one place for a feature and a token, in every term that becomes one.
  std::vector<uint8_t> twice(d_sae, 0);
  for (auto& term : terms)
    for (int64_t j = 0; j < d_sae; ++j)
      for (int64_t e = term.by.starts[j] + 1; e < term.by.starts[j + 1]; ++e)
        twice[j] |= term.by.rows[e] == term.by.rows[e - 1];
  for (auto& term : terms) {
    std::vector<uint32_t> often;
    int64_t entries = 0;
    for (int64_t j = 0; j < d_sae; ++j) {
      int64_t begin = term.by.starts[j], end = term.by.starts[j + 1];
      if (4 * (end - begin) < n || begin == end || twice[j]) continue;  // as dense_pays, one by one
      often.push_back(static_cast<uint32_t>(j));
      entries += end - begin;
    }
    // A token that does not use a feature adds nothing to it: zero times infinity would.
    bool dense = dense_pays(n, static_cast<int64_t>(often.size()), entries) && all_finite(term.residual, n * d_out) &&
                 all_finite(x, n * d_in);
    (dense ? dense_ : sparse_).push_back(term);
    if (dense)
      for (uint32_t j : often) apart_[j] = 1;
  }
  for (int64_t j = 0; j < d_sae; ++j)
    if (apart_[j]) features_.push_back(static_cast<uint32_t>(j));
}

void DenseTerms::update(const Update& u, int64_t n, const std::function<Update(int64_t)>& of_part) const {
  const auto& k = kernels();
  int64_t dec_stride = panels_of(u.d_out) * k.panel, enc_stride = panels_of(u.d_in) * k.panel;
  auto count = static_cast<int64_t>(features_.size());
  int64_t block = block_of(count, dec_stride + enc_stride, kPart);
  int64_t tokens = block_of(n, 2 * dec_stride + enc_stride, k.panel);
  int64_t width = panels_of(tokens) * k.panel;
  int64_t gradients = block * (dec_stride + enc_stride + 1);
  float* memory = workspace().get(round_up(gradients, 16) + width * (2 * dec_stride + enc_stride) + 2 * block * width);
  Update sparse = u;
  sparse.terms = sparse_.data(), sparse.n_terms = static_cast<int>(sparse_.size());
  for (int64_t b = 0; b < count; b += block) {
    int64_t m = std::min(block, count - b);
    float* enc = memory + block * dec_stride;
    Apart rows{features_.data() + b, 0, m, memory, enc, enc + block * enc_stride, dec_stride, enc_stride};
    auto part_of = [&](int64_t i) {
      Apart part = rows;
      part.begin = i * kPart, part.end = std::min(m, (i + 1) * kPart);
      return part;
    };
    parallel_for(parts_of(m), [&](int64_t i, int) { k.gather(sparse, part_of(i)); });
    for (auto& term : dense_)
      for (int64_t t = 0; t < n; t += tokens)
        add(u, term, t, std::min(n, t + tokens), rows, memory + round_up(gradients, 16));
    parallel_for(parts_of(m), [&](int64_t i, int) { k.finish(of_part(b / kPart + i), part_of(i)); });
  }
}

void DenseTerms::add(const Update& u, const Term& term, int64_t t0, int64_t t1, const Apart& rows,
                     float* memory) const {
  const auto& k = kernels();
  int64_t n = t1 - t0, m = rows.end, width = panels_of(n) * k.panel;
  const float *r = term.residual + t0 * u.d_out, *x = u.x + t0 * u.d_in;
  float* turned = memory;
  float* r_panels = turned + width * u.d_out;
  float* x_panels = r_panels + n * rows.dec_stride;
  float* values = x_panels + n * rows.enc_stride;
  float* dz = values + m * width;

  int64_t at_r = panels_of(n), at_x = at_r + panels_of(u.d_out), at_rows = at_x + panels_of(u.d_in);
  parallel_for(at_rows + parts_of(m), [&](int64_t i, int) {
    if (i < at_r) return k.turned_panel_of(r, n, u.d_out, turned, i);
    if (i < at_x) return void(k.panel_of(r, nullptr, n, u.d_out, r_panels, i - at_r));
    if (i < at_rows) return void(k.panel_of(x, nullptr, n, u.d_in, x_panels, i - at_x));
    int64_t begin = (i - at_rows) * kPart, end = std::min(m, begin + kPart);
    std::memset(values + begin * width, 0, (end - begin) * width * sizeof(float));
    std::memset(dz + begin * width, 0, (end - begin) * width * sizeof(float));
    for (int64_t q = begin; q < end; ++q) {
      const uint32_t* from = term.by.rows + term.by.starts[rows.features[q]];
      const uint32_t* to = term.by.rows + term.by.starts[rows.features[q] + 1];
      for (auto* e = std::lower_bound(from, to, static_cast<uint32_t>(t0)); e < to && *e < t1; ++e)
        values[q * width + *e - t0] = term.by.values[e - term.by.rows];
    }
  });
  multiply({{{u.w_dec.w, u.d_out, rows.features, turned, u.d_out, n, dz, width}, m}});
  parallel_for(parts_of(m), [&](int64_t i, int) {
    for (int64_t q = i * kPart; q < std::min(m, (i + 1) * kPart); ++q)
      rows.bias[q] += k.entries_of(values + q * width, dz + q * width, term.scale, n);
  });
  multiply({{{values, width, nullptr, r_panels, n, u.d_out, rows.dec, rows.dec_stride}, m},
            {{dz, width, nullptr, x_panels, n, u.d_in, rows.enc, rows.enc_stride}, m}});
}

}  // namespace mlxsae::cpu
