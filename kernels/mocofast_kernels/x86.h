/* What the compiled ops need on x86-64. Include it after compilers.h. */

/* Older compilers do not know all of the instructions. */
#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11))
#define X86 1
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define AVX512 "avx512f,avx512dq,avx512bw,avx512vl,fma"
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Returns whether this CPU has AVX-512, with products of bfloat16 if asked for. */
static inline int has_avx512(int bfloat16) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma") && (!bfloat16 || __builtin_cpu_supports("avx512bf16"));
}
#else
static inline int has_avx512(int bfloat16) {
  (void)bfloat16;
  return 0;
}
#endif

/* GNU OpenMP's GOMP_parallel: calls a function with an argument on several threads. */
typedef void parallel(void (*)(void *), void *, unsigned, unsigned);
