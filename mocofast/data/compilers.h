/* What the compiled modules need from every compiler. Include it after the other headers. */

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

/* A function whose arguments change gets another name: an older library, which `make setup` has not
 * compiled again, then misses a function, and PyTorch serves. */
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define restrict __restrict
#define __builtin_fmaf fmaf
#endif
