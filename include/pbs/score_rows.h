// Rows of the queries' tile in score_keys. Host and device.
#pragma once

namespace pbs::cuda {

// Queries of a head, at most.
constexpr int kScoreTileRows = 128;

}  // namespace pbs::cuda
