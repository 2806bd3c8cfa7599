// Powers of two on the device.
#pragma once

#include "pbs/params.h"  // kLog2e

namespace pbs::cuda {

// One instruction; accurate to 2 ulp, and 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pbs::cuda
