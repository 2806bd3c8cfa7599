// The scheduler: a warp that draws query blocks from a counter before the other warps need them,
// and loads their Q.
#pragma once

#include "epilogue.cuh"
#include "load.cuh"
#include "work.cuh"

namespace pbs::cuda::sm90 {

template <class Traits>
class Scheduler {
 public:
  using Shared = typename Traits::SharedStorage;
  using Work = typename Traits::Work;
  using Element = typename Traits::Element;

  __device__ Scheduler(const AttendArgs& args, Shared& shared)
      : args_(args),
        params_(args.params),
        shared_(shared),
        lane_(threadIdx.x % 32),
        drawer_(args) {}

  __device__ void run() {
    cudaGridDependencySynchronize();  // the order is complete
    while (true) {
      const Work& work = draw();
      if (work.tiles.total < 0) return;
      load_q(work);
    }
  }

 private:
  // Draws the next query block that visits any key, and publishes it.
  __device__ const Work& draw() {
    Work& work = shared_.work[work_.stage()];
    shared_.work_empty[work_.stage()].wait(work_.parity() ^ 1);
    while (true) {
      int draw_idx = 0;
      if (lane_ == 0) draw_idx = drawer_.draw();
      draw_idx = __shfl_sync(~0u, draw_idx, 0);
      if (lane_ == 0) drawer_.fill(draw_idx, Traits::kKeys, work);
      __syncwarp();
      if (work.tiles.total != 0) break;
      write_nothing<Traits::kHeadDim>(work, params_.out.row_stride);
      __syncwarp();
    }
    if (lane_ == 0) shared_.work_full[work_.stage()].arrive();
    work_.advance();
    return work;
  }

  __device__ void load_q(const Work& work) {
    shared_.q_empty[q_.stage()].wait(q_.parity() ^ 1);
    if (cute::elect_one_sync()) {
      auto& full = shared_.q_full[q_.stage()];
      full.arrive_and_expect_tx(Traits::kRows * Traits::kHeadDim * 2);
      copy_box(args_.q, full, shared_.q + q_.stage() * Traits::kRows * Traits::kHeadDim,
               work.first_row, 0, work.q_head, work.b);
    }
    __syncwarp();
    q_.advance();
  }

  const AttendArgs& args_;
  const AttendParams& params_;
  Shared& shared_;
  int lane_;
  WorkDrawer drawer_;
  RingState<Traits::kQStages> q_;
  RingState<Traits::kWorkStages> work_;
};

}  // namespace pbs::cuda::sm90
