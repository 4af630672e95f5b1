// <metal_simdgroup_matrix>: 8x8 tiles, two neighbouring elements of a row a lane, in the layout that Apple's GPUs use.
#pragma once
#include "simd.h"

namespace metal {

template <class T, int Rows = 8, int Cols = 8>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Cols == 8, "simdgroup matrices are 8x8");
  using storage_type = vec<T, 2>;
  storage_type elements;

  static void place(int& row, int& col) {
    int l = msl::lane(), quad = l / 4;
    row = (quad & 4) + l / 2 % 4;
    col = (quad & 2) * 2 + l % 2 * 2;
  }
  static int lane_of(int row, int col) {
    return (row & 4 ? 16 : 0) + (col & 4 ? 8 : 0) + (row & 3) * 2 + (col & 2 ? 1 : 0);
  }

  simdgroup_matrix() = default;
  template <class U, std::enable_if_t<std::is_constructible<T, U>::value && !is_vec<U>, int> = 0>
  explicit simdgroup_matrix(U diagonal) {
    int row, col;
    place(row, col);
    for (int j = 0; j < 2; ++j) elements.d[j] = row == col + j ? T(diagonal) : T(0);
  }
  storage_type& thread_elements() { return elements; }
  const storage_type& thread_elements() const { return elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;

template <class T, int Rows, int Cols = Rows, class U>
simdgroup_matrix<T, Rows, Cols> make_filled_simdgroup_matrix(U v) {
  simdgroup_matrix<T, Rows, Cols> m;
  m.elements = vec<T, 2>(T(v));
  return m;
}
template <class T, int Rows, int Cols = Rows, class U>
simdgroup_matrix<T, Rows, Cols> make_diagonal_simdgroup_matrix(U v) {
  return simdgroup_matrix<T, Rows, Cols>(v);
}
template <class T, class P>
void simdgroup_load(simdgroup_matrix<T>& m, P* source, ulong elements_per_row = 8, ulong2 origin = ulong2(0ul),
                    bool transpose = false) {
  static_assert(std::is_same<std::remove_cv_t<P>, T>::value, "simdgroup_load: the memory's type is not the matrix's");
  int row, col;
  m.place(row, col);
  for (int j = 0; j < 2; ++j) {
    ulong r = transpose ? col + j : row, c = transpose ? row : col + j;
    m.elements.d[j] = source[(origin.y + r) * elements_per_row + origin.x + c];
  }
}
template <class T, class P>
void simdgroup_store(simdgroup_matrix<T> m, P* target, ulong elements_per_row = 8, ulong2 origin = ulong2(0ul),
                     bool transpose = false) {
  static_assert(std::is_same<P, T>::value, "simdgroup_store: the memory's type is not the matrix's");
  int row, col;
  m.place(row, col);
  for (int j = 0; j < 2; ++j) {
    ulong r = transpose ? col + j : row, c = transpose ? row : col + j;
    target[(origin.y + r) * elements_per_row + origin.x + c] = m.elements.d[j];
  }
}
// d = a b + c, accumulated in float from low to high inner index.
template <class D, class A, class B, class C>
MSL_UNCHECKED void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a,
                                                 const simdgroup_matrix<B>& b, const simdgroup_matrix<C>& c) {
  struct Pair {
    vec<A, 2> a;
    vec<B, 2> b;
  };
  auto t = msl::exchange(Pair{a.elements, b.elements}, msl::matrix, MSL_SITE);
  if (t.mask != 0xffffffffu) msl_misuse("a simdgroup matrix needs all 32 lanes", MSL_SITE);
  msl_matrix_multiply();
  int row, col;
  d.place(row, col);
  vec<C, 2> addend = c.elements;
  for (int j = 0; j < 2; ++j) {
    float sum = (float)addend.d[j];
    for (int k = 0; k < 8; ++k) {
      float u = (float)t.raw(d.lane_of(row, k)).a.d[k & 1], v = (float)t.raw(d.lane_of(k, col + j)).b.d[j];
      sum = __builtin_fmaf(u, v, sum);
    }
    d.elements.d[j] = D(sum);
  }
}
template <class D, class A, class B>
void simdgroup_multiply(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a, const simdgroup_matrix<B>& b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(0));
}
template <class T>
simdgroup_matrix<T> operator*(const simdgroup_matrix<T>& a, const simdgroup_matrix<T>& b) {
  simdgroup_matrix<T> d;
  simdgroup_multiply(d, a, b);
  return d;
}

}  // namespace metal
