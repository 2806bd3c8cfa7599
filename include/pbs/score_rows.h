// Rows of the tile of queries in score_keys. Host and device.
#pragma once

namespace pbs::cuda {

// The largest number of queries of a head.
constexpr int kScoreTileRows = 128;

}  // namespace pbs::cuda
