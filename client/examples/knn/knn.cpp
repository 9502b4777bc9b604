// How a product in single precision can leave a training row out without any doubt.
//
// Let x be a test row, t a training row, n the number of columns, d the squared distance of x and t, and D
// the squared distance of the worst of the k neighbours found so far. Rows come in the order of their index,
// so t becomes a neighbour exactly if d < D, a tie going to the row that is there already. Since
// d = |x|^2 - 2 x.t + |t|^2, that is
//
//   (1)  x.t - |t|^2/2 > (|x|^2 - D)/2.
//
// Let p be what sgemm computes for x.t. No term of the sum is negative, so in whatever order the n terms are
// added up, with fused multiply-add or without, |p - x.t| <= g x.t with g = nu/(1 - nu) and u = 2^-24
// (N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1, where the bound is
// g |x|.|t|). Hence x.t <= p/(1 - g). This needs a sum of the n products, as every CPU kernel of OpenBLAS
// computes it; methods like Strassen's subtract and have other bounds.
//
// The scan computes score = fl(fl(c p) - h), with c at least (1 + 4u)/(1 - g) before c itself is rounded,
// and h the float at or below |t|^2/2. Then fl(c p) >= p/(1 - g) >= x.t, so fl(c p) - h is above the right
// side of (1) if d < D, and rounding is monotonic:
//
//   (2)  d < D implies score >= the float at or below (|x|^2 - D)/2.
//
// A compiler that contracts c p - h into one operation saves a rounding; (2) holds as well. Whatever passes
// (2) is decided in integers. Of 60,000 images of clothing that is about 50 rows for k = 5; if all rows are
// nearly equal, it is all of them, which costs time but no correctness.
#include "client/examples/knn/knn.hpp"

#include <algorithm>
#include <array>
#include <cblas.h>
#include <cmath>
#include <limits>

#include <fmt/format.h>

namespace cowmgr::knn {
namespace {

// Measured on a Zen 4 core with 784 columns: sgemm runs at its full 95 GFLOP/s from these sizes on, and the
// products (384 KiB) stay in the L2 cache until they are scanned.
constexpr std::size_t kBlockRows = 384;  // test rows of one product
constexpr std::size_t kTileRows = 256;   // training rows of one product
// Scores that are tested as one: a few vector instructions, one branch that is nearly never taken.
constexpr std::size_t kGroup = 64;

// The largest float that is not above `value`.
float round_down(double value) {
  const auto nearest = static_cast<float>(value);
  return static_cast<double>(nearest) > value
             ? std::nextafter(nearest, -std::numeric_limits<float>::infinity())
             : nearest;
}

// The c of the proof above. kMaxColumns keeps nu at or below 2^-9.
float inflation(std::size_t columns) {
  constexpr double kUnit = 0x1p-24;
  const double nu = static_cast<double>(columns) * kUnit;
  const double gamma = nu / (1 - nu);
  return static_cast<float>((1 + 4 * kUnit) / (1 - gamma));
}

// Whether all are whole numbers from 0 to 255. No branch for a single value, and no conversion to an integer
// (undefined for strangers, and gcc would guard it by a branch): from 2^23 on floats have no fraction, so the
// sum is rounded.
bool all_pixels(std::span<const float> values) {
  constexpr float kNoFraction = 0x1p23F;
  unsigned pixels = 1;
  for (const float value : values) {
    const float whole = (value + kNoFraction) - kNoFraction;
    pixels &= static_cast<unsigned>(value == whole) & static_cast<unsigned>(value >= 0.0F) &
              static_cast<unsigned>(value <= 255.0F);
  }
  return pixels == 1;
}

std::int32_t squared_norm(std::span<const float> row) {
  std::int32_t sum = 0;
  for (const float value : row) sum += static_cast<std::int32_t>(value * value);  // exact: 255^2 < 2^24
  return sum;
}

std::int32_t squared_distance(std::span<const float> a, std::span<const float> b) {
  std::int32_t sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const float difference = a[i] - b[i];
    sum += static_cast<std::int32_t>(difference * difference);
  }
  return sum;
}

struct Neighbour {
  std::int32_t distance = 0;  // squared
  std::uint8_t label = 0;
};

// A test row and the nearest training rows met so far.
class Query {
 public:
  Query(std::span<const float> row, std::size_t k) : row_(row), squared_norm_(squared_norm(row)), k_(k) {
    nearest_.reserve(k);
  }

  // A training row with a lower score is not among the k nearest: the right side of (2).
  [[nodiscard]] float threshold() const { return threshold_; }

  // Training rows must come in the order of their index: among equals, the one that came first stays.
  void consider(std::span<const float> train_row, std::uint8_t label) {
    const std::int32_t distance = squared_distance(row_, train_row);
    if (nearest_.size() == k_) {
      if (distance >= nearest_.back().distance) return;
      nearest_.pop_back();
    }
    const auto place = std::ranges::upper_bound(nearest_, distance, {}, &Neighbour::distance);
    nearest_.insert(place, {distance, label});
    if (nearest_.size() == k_) threshold_ = round_down((squared_norm_ - static_cast<double>(worst())) / 2);
  }

  [[nodiscard]] std::uint8_t vote() const {
    std::array<std::size_t, 256> votes{};
    for (const Neighbour& neighbour : nearest_) ++votes[neighbour.label];
    return static_cast<std::uint8_t>(std::ranges::max_element(votes) - votes.begin());  // the first of equals
  }

 private:
  [[nodiscard]] std::int32_t worst() const { return nearest_.back().distance; }

  std::span<const float> row_;
  std::int32_t squared_norm_;
  std::size_t k_;
  float threshold_ = -std::numeric_limits<float>::infinity();
  std::vector<Neighbour> nearest_;  // sorted
};

// A run of training rows, of at most kTileRows.
struct Tile {
  std::span<const float> pixels;
  std::span<const std::uint8_t> labels;
  std::span<const float> half_norms;
};

Tile tile_of(const TrainingSet& train, std::span<const float> half_norms, std::size_t first) {
  const std::size_t rows = std::min(kTileRows, half_norms.size() - first);
  return {train.pixels.subspan(first * train.columns, rows * train.columns),
          train.labels.subspan(first, rows), half_norms.subspan(first, rows)};
}

// products[i * kTileRows + j] = row i of `test` . row j of `tile`
void multiply(std::span<const float> test, const Tile& tile, std::size_t columns, std::span<float> products) {
  const auto test_rows = static_cast<blasint>(test.size() / columns);
  const auto tile_rows = static_cast<blasint>(tile.labels.size());
  const auto width = static_cast<blasint>(columns);
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, test_rows, tile_rows, width, 1.0F, test.data(), width,
              tile.pixels.data(), width, 0.0F, products.data(), static_cast<blasint>(kTileRows));
}

// The left side of (2), for all the rows of a tile.
struct Scores {
  std::span<const float> products;
  std::span<const float> half_norms;
  float inflation;

  [[nodiscard]] bool reaches(std::size_t row, float threshold) const {
    return inflation * products[row] - half_norms[row] >= threshold;
  }
  // Whether any row of the group does. Has no early exit, so that it becomes vector instructions.
  [[nodiscard]] bool group_reaches(std::size_t first, float threshold) const {
    unsigned hits = 0;
    for (std::size_t row = first; row < first + kGroup; ++row) {
      hits |= static_cast<unsigned>(reaches(row, threshold));
    }
    return hits != 0;
  }
};

void scan(const Tile& tile, const Scores& scores, std::size_t columns, Query& query) {
  const std::size_t rows = tile.labels.size();
  for (std::size_t first = 0; first < rows; first += kGroup) {
    const std::size_t end = std::min(first + kGroup, rows);
    if (end == first + kGroup && !scores.group_reaches(first, query.threshold())) continue;
    for (std::size_t row = first; row < end; ++row) {
      if (!scores.reaches(row, query.threshold())) continue;
      query.consider(tile.pixels.subspan(row * columns, columns), tile.labels[row]);
    }
  }
}

std::vector<float> half_norms_of(const TrainingSet& train) {
  std::vector<float> result(train.labels.size());
  for (std::size_t row = 0; row < result.size(); ++row) {
    const auto pixels = train.pixels.subspan(row * train.columns, train.columns);
    result[row] = round_down(squared_norm(pixels) / 2.0);
  }
  return result;
}

}  // namespace

Result<KnnClassifier> KnnClassifier::make(const TrainingSet& train, std::size_t k) {
  const std::size_t rows = train.labels.size();
  if (train.columns == 0 || train.columns > kMaxColumns) {
    return fail(Errc::invalid_argument,
                fmt::format("{} columns; 1 to {} can be classified exactly", train.columns, kMaxColumns));
  }
  if (train.pixels.size() / train.columns != rows || train.pixels.size() % train.columns != 0) {
    return fail(Errc::invalid_argument, fmt::format("{} pixels are not {} rows of {} columns",
                                                    train.pixels.size(), rows, train.columns));
  }
  if (k == 0 || k > rows) {
    return fail(Errc::invalid_argument,
                fmt::format("k is {}; it must be from 1 to the {} training rows", k, rows));
  }
  if (!all_pixels(train.pixels)) {
    return fail(Errc::invalid_argument,
                "the training set has values that are not whole numbers from 0 to 255");
  }
  openblas_set_num_threads(1);
  KnnClassifier result(train, k);
  result.half_norms_ = half_norms_of(train);
  return result;
}

Result<void> KnnClassifier::classify(std::span<const float> test, std::span<std::uint8_t> predictions) const {
  const std::size_t rows = predictions.size();
  if (test.size() / train_.columns != rows || test.size() % train_.columns != 0) {
    return fail(Errc::invalid_argument,
                fmt::format("{} pixels are not {} rows of {} columns", test.size(), rows, train_.columns));
  }
  if (!all_pixels(test)) {
    return fail(Errc::invalid_argument, "the test rows have values that are not whole numbers from 0 to 255");
  }
  // Blocks of about equal size: a remainder of few rows would read all the training rows for little.
  const std::size_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<float> products(std::min(rows, kBlockRows) * kTileRows);
  for (std::size_t block = 0; block < blocks; ++block) {
    const std::size_t first = rows * block / blocks;
    const std::size_t count = rows * (block + 1) / blocks - first;
    classify_block(test.subspan(first * train_.columns, count * train_.columns),
                   predictions.subspan(first, count), products);
  }
  return {};
}

void KnnClassifier::classify_block(std::span<const float> test, std::span<std::uint8_t> predictions,
                                   std::span<float> products) const {
  const float factor = inflation(train_.columns);
  std::vector<Query> queries;
  queries.reserve(predictions.size());
  for (std::size_t row = 0; row < predictions.size(); ++row) {
    queries.emplace_back(test.subspan(row * train_.columns, train_.columns), k_);
  }
  for (std::size_t first = 0; first < train_.labels.size(); first += kTileRows) {
    const Tile tile = tile_of(train_, half_norms_, first);
    multiply(test, tile, train_.columns, products);
    for (std::size_t row = 0; row < queries.size(); ++row) {
      scan(tile, {products.subspan(row * kTileRows, tile.labels.size()), tile.half_norms, factor},
           train_.columns, queries[row]);
    }
  }
  std::ranges::transform(queries, predictions.begin(), &Query::vote);
}

}  // namespace cowmgr::knn
