// From a launch's bindings to the arguments of a kernel function, and the description of each argument's type for
// Python.
#pragma once
#include "atomic.h"
#include "hooks.h"

namespace msl {

enum class Source : int {
  buffer,
  threadgroup,  // memory whose size the launch gives
  thread_position_in_grid,
  thread_position_in_threadgroup,
  threadgroup_position_in_grid,
  threads_per_threadgroup,
  dispatch_threads_per_threadgroup,
  threadgroups_per_grid,
  threads_per_grid,
  thread_index_in_threadgroup,
  thread_index_in_simdgroup,
  simdgroup_index_in_threadgroup,
  simdgroups_per_threadgroup,
  dispatch_simdgroups_per_threadgroup,
  threads_per_simdgroup,
  thread_index_in_quadgroup,
  quadgroup_index_in_threadgroup,
  quadgroups_per_threadgroup
};

struct Parameter {
  Source source;
  int index;
};
// Element type of memory behind a pointer or reference: scalar in NumPy's letters ('f', 'i', 'u', 'b' for bfloat, '?'
// bool, 'V' for a struct), its size, and how many bytes one element of the array or the referred value takes.
struct Described {
  char scalar;
  int scalar_bytes, bytes, constant;
};
struct Kernel {
  const char* name;
  void (*run)();
  int parameters;
  const Described* described;
};

template <class T>
struct is_atomic : std::false_type {};
template <class T>
struct is_atomic<metal::_atomic<T>> : std::true_type {};

template <class T>
constexpr Described describe_value(bool constant) {
  if constexpr (is_atomic<T>::value) {
    return describe_value<decltype(T::value)>(constant);
  } else {
    using E = metal::element<T>;
    char c = 'V';
    if constexpr (std::is_same<E, bool>::value)
      c = '?';
    else if constexpr (std::is_same<E, bfloat>::value)
      c = 'b';
    else if constexpr (metal::is_real<E>)
      c = 'f';
    else if constexpr (std::is_integral<E>::value)
      c = std::is_signed<E>::value ? 'i' : 'u';
    return {c, c == 'V' ? 1 : (int)sizeof(E), (int)sizeof(T), constant};
  }
}
template <class P>
constexpr Described describe() {
  if constexpr (std::is_pointer<P>::value || std::is_reference<P>::value) {
    using T = std::remove_pointer_t<std::remove_reference_t<P>>;
    if constexpr (std::is_void<T>::value)
      return {'V', 1, 1, std::is_const<T>::value};
    else
      return describe_value<std::remove_cv_t<T>>(std::is_const<T>::value);
  } else {
    return describe_value<std::remove_cv_t<P>>(true);
  }
}
template <class T>
constexpr size_t grain() {
  constexpr Described d = describe_value<std::remove_cv_t<std::remove_all_extents_t<T>>>(false);
  return d.scalar == 'V' ? 1 : (size_t)d.scalar_bytes;
}
// What a `threadgroup T name[...]` declaration becomes: `T (&name)[...] = msl::Slot<id>();`
template <int Id>
struct Slot {
  template <class T>
  operator T&() const {
    return *(T*)msl_threadgroup_slot(Id, sizeof(T), alignof(T), grain<T>());
  }
};
template <class... P>
struct Description {
  static constexpr Described list[sizeof...(P) + 1] = {describe<P>()..., {}};
};
template <class... P>
constexpr const Described* describe_all(void (*)(P...)) {
  return Description<P...>::list;
}

template <class T>
T from_three(U3 v) {
  if constexpr (!metal::is_vec<T>)
    return T(v.x);
  else if constexpr (metal::shape<T>::n == 2)
    return T(v.x, v.y);
  else
    return T(v.x, v.y, v.z);
}
template <class T>
T builtin(Source source) {
  const Thread& t = *msl_self();
  uint32_t one = 0;
  switch (source) {
    case Source::thread_position_in_grid:
      return from_three<T>({t.groups.x ? t.group.x * t.full_group_size.x + t.position_in_group.x : 0,
                            t.group.y * t.full_group_size.y + t.position_in_group.y,
                            t.group.z * t.full_group_size.z + t.position_in_group.z});
    case Source::thread_position_in_threadgroup:
      return from_three<T>(t.position_in_group);
    case Source::threadgroup_position_in_grid:
      return from_three<T>(t.group);
    case Source::threads_per_threadgroup:
      return from_three<T>(t.group_size);
    case Source::dispatch_threads_per_threadgroup:
      return from_three<T>(t.full_group_size);
    case Source::threadgroups_per_grid:
      return from_three<T>(t.groups);
    case Source::threads_per_grid:
      return from_three<T>(t.grid);
    case Source::thread_index_in_threadgroup:
      one = t.index;
      break;
    case Source::thread_index_in_simdgroup:
      one = t.lane;
      break;
    case Source::simdgroup_index_in_threadgroup:
      one = t.simdgroup;
      break;
    case Source::simdgroups_per_threadgroup:
      one = t.simdgroups;
      break;
    case Source::dispatch_simdgroups_per_threadgroup:
      one = (t.full_group_size.x * t.full_group_size.y * t.full_group_size.z + simd_width - 1) / simd_width;
      break;
    case Source::threads_per_simdgroup:
      one = simd_width;
      break;
    case Source::thread_index_in_quadgroup:
      one = t.index % 4;
      break;
    case Source::quadgroup_index_in_threadgroup:
      one = t.index / 4;
      break;
    case Source::quadgroups_per_threadgroup:
      one = (t.group_size.x * t.group_size.y * t.group_size.z + 3) / 4;
      break;
    default:
      msl_misuse("a kernel argument has no source", nullptr);
  }
  return from_three<T>({one, 0, 0});
}
template <class P>
P argument(Parameter p) {
  if constexpr (std::is_pointer<P>::value || std::is_reference<P>::value) {
    using T = std::remove_pointer_t<std::remove_reference_t<P>>;
    void* memory = p.source == Source::threadgroup
                       ? msl_threadgroup_slot(-1 - p.index, msl_launch_state()->dynamic[p.index], 16, grain<T>())
                       : msl_launch_state()->buffers[p.index].data;
    if constexpr (std::is_pointer<P>::value)
      return (P)memory;
    else
      return *(std::remove_reference_t<P>*)memory;
  } else {
    return builtin<std::remove_cv_t<P>>(p.source);
  }
}
template <class... P, size_t... I>
void call(void (*kernel)(P...), const Parameter* parameters, std::index_sequence<I...>) {
  kernel(argument<P>(parameters[I])...);
}
template <class... P>
void call(void (*kernel)(P...), const Parameter* parameters) {
  call(kernel, parameters, std::index_sequence_for<P...>());
}

}  // namespace msl
