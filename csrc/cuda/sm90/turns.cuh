// Decides which warpgroup may start a product.
#pragma once

#include "sm90/named_barrier.cuh"

namespace pbs::cuda::sm90 {

// The warpgroups start their products one after the other. If products ran at the same time, all
// would end late, and the tensor cores would wait for exponentials. Uses one named barrier per
// warpgroup, from kFirstBarrier on.
template <int kNumWarpgroups, int kFirstBarrier>
class Turns {
  static_assert(kFirstBarrier + kNumWarpgroups <= 16);

 public:
  __device__ explicit Turns(int warpgroup) : warpgroup_(warpgroup) {
    if (warpgroup == kNumWarpgroups - 1) pass_on();
  }
  __device__ void await() const { sync_barrier(kFirstBarrier + warpgroup_, 256); }
  __device__ void pass_on() const {
    arrive_barrier(kFirstBarrier + (warpgroup_ + 1) % kNumWarpgroups, 256);
  }

 private:
  int warpgroup_;
};

}  // namespace pbs::cuda::sm90
