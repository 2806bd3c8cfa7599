// Operands and accumulators of a thread in a consumer warpgroup, with CuTe's names.
#pragma once

#include "common/attend/softmax.cuh"
#include "traits.cuh"

namespace pbs::cuda::sm90 {

template <class Traits, class QkThread, class K, class V, class O, class S, class P>
struct ConsumerOperands {
  typename Traits::QkMma qk_mma;
  typename Traits::PvMma pv_mma;
  QkThread qk_thread;
  K tSrK;  // (MMA, 1, D / 16, stage)
  V tOrV;  // (MMA, 1, keys / 16, stage)
  O tOrO;
  S tSrS;
  P tOrP;
  Softmax softmax;
  float rescale[kThreadRows];  // factor for the sums so far, if a tile asks for it
};

// Operands of warpgroup 0 or 1.
template <class Traits>
CUTLASS_DEVICE auto make_operands(typename Traits::SharedStorage& shared, int warpgroup,
                                  float scale_log2) {
  using Element = typename Traits::Element;
  typename Traits::QkMma qk_mma;
  typename Traits::PvMma pv_mma;
  const cute::Tensor sK =
      cute::make_tensor(cute::make_smem_ptr(shared.k), typename Traits::LayoutK{});
  const cute::Tensor sVt =
      cute::make_tensor(cute::make_smem_ptr(shared.v), typename Traits::LayoutVt{});
  auto qk_thread = qk_mma.get_thread_slice(128 * uniform(warpgroup));
  auto pv_thread = pv_mma.get_thread_slice(128 * uniform(warpgroup));
  auto tSrK = qk_thread.partition_fragment_B(sK);
  auto tOrV = pv_thread.partition_fragment_B(sVt);
  auto tOrO =
      cute::partition_fragment_C(pv_mma, Shape<Int<Traits::kRows>, Int<Traits::kHeadDim>>{});
  auto tSrS = cute::partition_fragment_C(qk_mma, Shape<Int<Traits::kRows>, Int<Traits::kKeys>>{});
  auto tOrP = cute::make_tensor<Element>(
      pv_thread
          .partition_A(cute::make_tensor(static_cast<Element*>(nullptr),
                                         Shape<Int<Traits::kRows>, Int<Traits::kKeys>>{},
                                         cute::GenRowMajor{}))
          .layout()
          .shape());
  return ConsumerOperands<Traits, decltype(qk_thread), decltype(tSrK), decltype(tOrV),
                          decltype(tOrO), decltype(tSrS), decltype(tOrP)>{
      qk_mma, pv_mma, qk_thread, tSrK, tOrV, tOrO, tSrS, tOrP, Softmax{scale_log2}, {}};
}

}  // namespace pbs::cuda::sm90
