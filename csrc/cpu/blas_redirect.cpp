#include "cpu/blas_redirect.h"

#include <algorithm>
#include <atomic>
#include <complex>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/parallel.h"

namespace mlxsae::cpu {
namespace {

enum : int { row_major = 101, no_trans = 111, trans = 112 };  // CBLAS' values

template <class T, class Scalar>
using Gemm = void (*)(int, int, int, int, int, int, Scalar, const T*, int, const T*, int, Scalar, T*, int);
template <class T, class Scalar>
using Gemv = void (*)(int, int, int, int, Scalar, const T*, int, const T*, int, Scalar, T*, int);
using Complex = std::complex<float>;

struct Routines {
  Gemm<float, float> sgemm;
  Gemm<double, double> dgemm;
  Gemm<Complex, const void*> cgemm;
  Gemv<float, float> sgemv;
  Gemv<double, double> dgemv;
};

std::atomic<const Routines*> routines{nullptr};
std::atomic<int> max_threads{1};

/** C [m, n] = op(A) [m, k] op(B) [k, n], row-major. */
template <class T, class Scalar>
struct Product {
  int trans_a, trans_b, m, n, k;
  Scalar alpha;
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
  Scalar beta;
  T* c;
  int64_t ldc;

  /** Rows [i0, i1) and columns [j0, j1) of it. */
  Product tile(int i0, int i1, int j0, int j1) const {
    Product p = *this;
    p.m = i1 - i0;
    p.n = j1 - j0;
    p.a += trans_a == no_trans ? i0 * lda : i0;
    p.b += trans_b == no_trans ? j0 : j0 * ldb;
    p.c += i0 * ldc + j0;
    return p;
  }

  void gemm(Gemm<T, Scalar> f) const {
    f(row_major, trans_a, trans_b, m, n, k, alpha, a, static_cast<int>(lda), b, static_cast<int>(ldb), beta, c,
      static_cast<int>(ldc));
  }

  /** The same row by row, for few rows: row of C = op(B)^T row of op(A). */
  void gemv(Gemv<T, Scalar> f) const {
    for (int i = 0; i < m; ++i) {
      T* y = c + i * ldc;
      // C may be fresh memory: beta = 0 must not read it, and not every gemv keeps to that where it holds a NaN.
      if (beta == Scalar(0)) std::fill_n(y, n, T(0));
      bool flip = trans_b == no_trans;  // B lies as [k, n]
      f(row_major, flip ? trans : no_trans, flip ? k : n, flip ? n : k, alpha, b, static_cast<int>(ldb),
        trans_a == no_trans ? a + i * lda : a + i, trans_a == no_trans ? 1 : static_cast<int>(lda),
        beta == Scalar(0) ? Scalar(1) : beta, y, 1);
    }
  }
};

/** Halves the longer side until there are tiles enough to even out unequal threads, or the tiles get too small. */
template <class P, class Run>
void share(const P& p, int64_t least_work, const Run& run) {
  int threads = std::min(max_threads.load(std::memory_order_relaxed), num_threads());
  int64_t rows = p.m, columns = p.n;
  auto up = [](int64_t x, int64_t unit) { return (x + unit - 1) / unit; };
  auto count = [&] { return up(p.m, rows) * up(p.n, columns); };
  if (threads > 1) {
    while (count() < 4 * threads && rows * columns * p.k >= 2 * least_work) {
      int64_t& side = rows > columns ? rows : columns;
      if (side <= 32) break;
      side = up(up(side, 2), 32) * 32;  // whole register tiles
    }
  }
  int64_t tiles = count(), across = up(p.n, columns);
  if (tiles == 1) return run(p);
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(threads, tiles), [&](int64_t, int) {
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      int64_t i = t / across * rows, j = t % across * columns;
      run(p.tile(static_cast<int>(i), static_cast<int>(std::min<int64_t>(p.m, i + rows)), static_cast<int>(j),
                 static_cast<int>(std::min<int64_t>(p.n, j + columns))));
    }
  });
}

// Multiply-adds below which a tile is not worth another thread: about 15 us of gemm, and of gemv, which waits for
// memory.
constexpr int64_t gemm_work = 1 << 21, gemv_work = 1 << 18;

template <class T, class Scalar>
void multiply(Gemm<T, Scalar> gemm, Gemv<T, Scalar> gemv, int order, int trans_a, int trans_b, int m, int n, int k,
              Scalar alpha, const T* a, int lda, const T* b, int ldb, Scalar beta, T* c, int ldc) {
  if (order != row_major) {  // C^T = op(B)^T op(A)^T, and a column-major matrix is its transpose, row-major
    std::swap(trans_a, trans_b);
    std::swap(m, n);
    std::swap(a, b);
    std::swap(lda, ldb);
  }
  Product<T, Scalar> p{trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc};
  if constexpr (!std::is_pointer_v<Scalar>) {
    if (n == 1 && m > 1 && ldc == 1) {  // a column: the transposed product is a row, and lies alike
      auto flipped = [](int t) { return t == no_trans ? trans : no_trans; };
      p = {flipped(trans_b), flipped(trans_a), 1, m, k, alpha, b, ldb, a, lda, beta, c, m};
    }
    if (p.m == 1 || (p.m <= 3 && int64_t(p.n) * k >= 2 * gemv_work))
      return share(p, gemv_work, [&](const auto& tile) { tile.gemv(gemv); });
  }
  share(p, gemm_work, [&](const auto& tile) { tile.gemm(gemm); });
}

const Routines& current() { return *routines.load(std::memory_order_acquire); }

}  // namespace
}  // namespace mlxsae::cpu

using namespace mlxsae::cpu;

void mlxsae_blas_use(const void* const r[5]) {
  auto as = [](auto& to, const void* from) { to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(from); };
  auto* fresh = new Routines;  // never freed: another thread may be inside a product
  as(fresh->sgemm, r[0]);
  as(fresh->dgemm, r[1]);
  as(fresh->cgemm, r[2]);
  as(fresh->sgemv, r[3]);
  as(fresh->dgemv, r[4]);
  routines.store(fresh, std::memory_order_release);
}

void mlxsae_blas_set_num_threads(int n) { max_threads.store(std::max(1, n), std::memory_order_relaxed); }

int mlxsae_blas_get_num_threads() { return std::min(max_threads.load(std::memory_order_relaxed), num_threads()); }

void mlxsae_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float* a, int lda,
                        const float* b, int ldb, float beta, float* c, int ldc) {
  multiply(current().sgemm, current().sgemv, order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void mlxsae_cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double* a,
                        int lda, const double* b, int ldb, double beta, double* c, int ldc) {
  multiply(current().dgemm, current().dgemv, order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void mlxsae_cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k, const void* alpha, const void* a,
                        int lda, const void* b, int ldb, const void* beta, void* c, int ldc) {
  multiply<Complex, const void*>(current().cgemm, nullptr, order, trans_a, trans_b, m, n, k, alpha,
                                 static_cast<const Complex*>(a), lda, static_cast<const Complex*>(b), ldb, beta,
                                 static_cast<Complex*>(c), ldc);
}
