#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace tsynd {

namespace {

const Kernels& choose() {
  const char* wanted = std::getenv("TSYND_ISA");
  const auto allowed = [&](const char* isa) { return wanted == nullptr || std::strcmp(wanted, isa) == 0; };
#if defined(TSYND_X86)
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::kKernels;
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma"))
    return avx2::kKernels;
#else
  (void)allowed;
#endif
  return generic::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace tsynd
