// Powers of two on the device.
#pragma once

namespace pbs::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// One instruction; accurate to 2 ulp, and 0 for -inf.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pbs::cuda
