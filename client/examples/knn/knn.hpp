// Exact k-nearest-neighbour classification of rows of pixels.
//
// 1. The answer is a function of the input alone: neighbours are ordered by squared Euclidean distance, an
//    exact integer, then by row index; the label with most votes wins, the smaller one if several have as
//    many.
// 2. Matrix products in single precision only say which rows may be left out, with a proven error bound
//    (knn.cpp). Neither the kernel that OpenBLAS picks, nor the way the rows are cut into calls can change
//    a prediction.
// 3. The training rows are never copied: they may be one read-only mapping that many processes share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "proto/errors.hpp"

namespace cowmgr::knn {

// Squared distances must fit 31 bits: 2^15 columns * 255^2 < 2^31.
inline constexpr std::size_t kMaxColumns = std::size_t{1} << 15U;

// Borrowed; both spans must outlive the classifier, and must not change meanwhile.
struct TrainingSet {
  std::span<const float> pixels;         // row after row; whole numbers from 0 to 255
  std::span<const std::uint8_t> labels;  // one for each row
  std::size_t columns = 0;               // pixels of one row, from 1 to kMaxColumns
};

class KnnClassifier {
 public:
  // Reads all of `train` once. invalid_argument unless sizes and pixels are as TrainingSet says and k is from
  // 1 to the number of rows. Sets the whole process's OpenBLAS to one thread: parallelism is one process for
  // each core. Holds 4 bytes for each training row.
  [[nodiscard]] static Result<KnnClassifier> make(const TrainingSet& train, std::size_t k);

  // Writes the label of each row of `test` (pixels like those of the training set) to `predictions`.
  // invalid_argument, with nothing written, unless the sizes match and all pixels are whole numbers from 0 to
  // 255. Takes about 1 ms a row against 60,000 training rows of 784 columns; calls with few rows (under some
  // 250) take longer for each. Needs 400 + 3k KiB of scratch memory besides that of OpenBLAS. Threads may
  // call it at once.
  [[nodiscard]] Result<void> classify(std::span<const float> test, std::span<std::uint8_t> predictions) const;

 private:
  KnnClassifier(const TrainingSet& train, std::size_t k) : train_(train), k_(k) {}
  void classify_block(std::span<const float> test, std::span<std::uint8_t> predictions,
                      std::span<float> products) const;

  TrainingSet train_;
  std::size_t k_;
  std::vector<float> half_norms_;  // |t|^2 / 2 of each training row, rounded down
};

}  // namespace cowmgr::knn
