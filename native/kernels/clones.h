// Included first by files with loops for wide vectors: each such function is compiled for several instruction sets and
// chosen at run time. Roots set no errno and comparisons raise no trap here, or such loops would not be vectorised;
// neither changes a result.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#if defined(__x86_64__)
#define STROMA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STROMA_CLONES
#endif
