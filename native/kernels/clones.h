// STROMA_CLONES: a function of loops that wide vectors serve; compiled for several instruction sets, chosen at run
// time.
#pragma once

#if defined(__x86_64__)
#define STROMA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STROMA_CLONES
#endif
