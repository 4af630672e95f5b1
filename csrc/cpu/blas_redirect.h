#pragma once
// Gemms with CBLAS' signatures that stand between libmlx.so and a BLAS on Linux (python/mlxsae/blas.py puts them
// there).
//
// OpenBLAS' own threads meet at spinning barriers inside each product. Where a core is taken, by another process or by
// MLX's own Python thread, a product of 128^3 waits for the scheduler: measured 4 ms in place of 30 us. Idle workers
// also spin on after each product and take a core from whatever runs next. So here the library runs single-threaded and
// we cut the product into tiles, which the team of cpu/parallel.h takes one by one as its threads come free. Products
// too small to share stay on the calling thread; those with a vector go to gemv, which reads the matrix once and does
// not pack it (measured 3-6 times as fast: every linear layer of a language model that generates one token at a time).

#if defined(_WIN32)
#error "There is no BLAS to redirect on Windows."
#endif
#define MLXSAE_BLAS_API extern "C" __attribute__((visibility("default")))

/**
 * The routines to call, in the order sgemm, dgemm, cgemm, sgemv, dgemv, with CBLAS' 32-bit signatures. They must be
 * re-entrant and use one thread. May be called at any time; a product under way ends with the routines it began with.
 */
MLXSAE_BLAS_API void mlxsae_blas_use(const void* const routines[5]);

/** Most threads that share one product, at least 1; the team's size bounds it too. */
MLXSAE_BLAS_API void mlxsae_blas_set_num_threads(int n);
MLXSAE_BLAS_API int mlxsae_blas_get_num_threads();

// C [m, n] = alpha op(A) op(B) + beta C, exactly as cblas_?gemm. Each element is summed over k by one call of the
// library, so for one shape and one number of threads the result is the same in every run.
MLXSAE_BLAS_API void mlxsae_cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                                        const float* a, int lda, const float* b, int ldb, float beta, float* c,
                                        int ldc);
MLXSAE_BLAS_API void mlxsae_cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha,
                                        const double* a, int lda, const double* b, int ldb, double beta, double* c,
                                        int ldc);
MLXSAE_BLAS_API void mlxsae_cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k, const void* alpha,
                                        const void* a, int lda, const void* b, int ldb, const void* beta, void* c,
                                        int ldc);
