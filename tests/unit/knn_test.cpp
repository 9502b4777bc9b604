// The core of the k-nearest-neighbour example against searches that are too simple to be wrong.
#include "client/examples/knn/knn.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <unistd.h>
#include <utility>
#include <vector>
#include <zlib.h>

#include <gtest/gtest.h>

#include "client/examples/knn/idx_file.hpp"

namespace cowmgr::knn {
namespace {

using Bytes = std::vector<std::uint8_t>;

template <class T>
Errc code_of(const Result<T>& result) {
  return result ? Errc{} : result.error().code;
}

constexpr const char* kFashionMnist = "/usr/share/datasets/fashion-mnist";

// ------------------------------------------------------------------------------------------- KnnClassifier

struct Data {
  Bytes train, labels, test;
  std::size_t columns = 0;
};

// All training rows, the nearest first; of equals, the smaller index first.
std::vector<std::size_t> sorted_rows(const Data& data, std::size_t test_row) {
  const auto test = std::span(data.test).subspan(test_row * data.columns, data.columns);
  std::vector<std::pair<std::int64_t, std::size_t>> order(data.labels.size());
  for (std::size_t row = 0; row < order.size(); ++row) {
    const auto train = std::span(data.train).subspan(row * data.columns, data.columns);
    std::int64_t distance = 0;
    for (std::size_t i = 0; i < data.columns; ++i) {
      const int difference = train[i] - test[i];
      distance += std::int64_t{difference} * difference;
    }
    order[row] = {distance, row};
  }
  std::ranges::sort(order);
  std::vector<std::size_t> rows(order.size());
  std::ranges::transform(order, rows.begin(), [](const auto& entry) { return entry.second; });
  return rows;
}

// The most frequent label of `rows`; of equals, the smaller.
std::uint8_t vote(const Bytes& labels, std::span<const std::size_t> rows) {
  std::array<std::size_t, 256> votes{};
  for (const std::size_t row : rows) ++votes[labels[row]];
  return static_cast<std::uint8_t>(std::ranges::max_element(votes) - votes.begin());
}

Bytes classify(const Data& data, std::size_t k) {
  const std::vector<float> train(data.train.begin(), data.train.end());
  const std::vector<float> test(data.test.begin(), data.test.end());
  Bytes result(test.size() / data.columns);
  const auto classifier = KnnClassifier::make({train, data.labels, data.columns}, k);
  if (!classifier) throw std::runtime_error(classifier.error().message);
  if (const auto done = classifier->classify(test, result); !done)
    throw std::runtime_error(done.error().message);
  return result;
}

// Compares with the whole rule as it is defined, in 64-bit integers. Skips what is more than the training
// rows.
void expect_exact(const Data& data, std::initializer_list<std::size_t> ks) {
  std::vector<std::vector<std::size_t>> sorted(data.test.size() / data.columns);
  for (std::size_t row = 0; row < sorted.size(); ++row) sorted[row] = sorted_rows(data, row);
  for (const std::size_t k : ks) {
    if (k > data.labels.size()) continue;
    Bytes expected(sorted.size());
    std::ranges::transform(sorted, expected.begin(),
                           [&](const auto& rows) { return vote(data.labels, std::span(rows).first(k)); });
    EXPECT_EQ(classify(data, k), expected) << data.labels.size() << " rows, k " << k;
  }
}

Bytes random_bytes(std::mt19937& random, std::size_t count, int lowest, int highest) {
  std::uniform_int_distribution<int> value(lowest, highest);
  Bytes result(count);
  std::ranges::generate(result, [&] { return static_cast<std::uint8_t>(value(random)); });
  return result;
}

// Labels that tell a row from its 255 neighbours in index: a wrong row is a wrong label.
Bytes labels_by_index(std::size_t rows) {
  Bytes result(rows);
  std::iota(result.begin(), result.end(), std::uint8_t{0});
  return result;
}

TEST(KnnClassifier, AgreesWithSortingWhereMostDistancesAreEqual) {
  std::mt19937 random(1);
  for (const std::size_t rows : {1U, 5U, 63U, 64U, 65U, 255U, 256U, 257U, 1000U}) {  // around group and tile
    for (const std::size_t columns : {1U, 3U, 8U}) {
      const Data data{random_bytes(random, rows * columns, 0, 2), random_bytes(random, rows, 0, 4),
                      random_bytes(random, 40 * columns, 0, 2), columns};
      expect_exact(data, {1, 2, 5, 50, 1000});
    }
  }
}

TEST(KnnClassifier, AgreesWithSortingForAnyNumberOfTestRows) {
  std::mt19937 random(2);
  for (const std::size_t rows : {1U, 383U, 384U, 385U, 769U}) {  // around one block of test rows, and two
    const Data data{random_bytes(random, std::size_t{300} * 10, 0, 255), labels_by_index(300),
                    random_bytes(random, rows * 10, 0, 255), 10};
    expect_exact(data, {1, 7});
  }
}

// Products near 5e7 and 1.3e9, of which float32 holds every fourth and every 128th number; many distances
// differ by less.
TEST(KnnClassifier, DecidesWhatSinglePrecisionCannot) {
  std::mt19937 random(3);
  for (const auto& [rows, columns] : std::array<std::array<std::size_t, 2>, 2>{{{1000, 784}, {100, 20000}}}) {
    const Data data{random_bytes(random, rows * columns, 253, 255), labels_by_index(rows),
                    random_bytes(random, 30 * columns, 253, 255), columns};
    expect_exact(data, {1, 3, 20});
  }
}

// One dark pixel in rows that are all white: every row has one of two distances to every test row.
TEST(KnnClassifier, FindsTheOneRowThatDiffersInOnePixel) {
  Data data{Bytes(std::size_t{700} * 784, 255), labels_by_index(700), Bytes(std::size_t{700} * 784, 255),
            784};
  for (std::size_t row = 0; row < 700; ++row) {
    data.train[row * 784 + row] = 254;
    data.test[row * 784 + row] = 254;
  }
  EXPECT_EQ(classify(data, 1), data.labels);
}

TEST(KnnClassifier, TakesTheFirstRowsWhenAllAreEqual) {
  for (const std::uint8_t pixel : Bytes{0, 1, 255}) {
    Data data{Bytes(std::size_t{600} * 784, pixel), Bytes(600, 9), Bytes(784, 255), 784};
    std::ranges::copy(std::array{7, 3, 3, 7, 7}, data.labels.begin());
    EXPECT_EQ(classify(data, 1), Bytes{7});
    EXPECT_EQ(classify(data, 3), Bytes{3});
    EXPECT_EQ(classify(data, 4), Bytes{3});  // two votes each: the smaller label
    EXPECT_EQ(classify(data, 5), Bytes{7});
    EXPECT_EQ(classify(data, 600), Bytes{9});
  }
}

TEST(KnnClassifier, TakesTheFirstOfDuplicates) {
  std::mt19937 random(4);
  Data data{random_bytes(random, std::size_t{100} * 784, 0, 255), labels_by_index(700), {}, 784};
  data.test = data.train;
  for (int copy = 0; copy < 6; ++copy)
    data.train.insert(data.train.end(), data.test.begin(), data.test.end());
  EXPECT_EQ(classify(data, 1), labels_by_index(100));
  expect_exact(data, {9});
}

TEST(KnnClassifier, HoldsTheLargestDistanceThereIs) {
  Data data{Bytes(2 * kMaxColumns, 0), {1, 2}, Bytes(2 * kMaxColumns, 255), kMaxColumns};
  data.train.back() = 1;  // the second row is nearer to white, by 509 of 2,130,739,200
  std::fill_n(data.test.begin(), kMaxColumns, std::uint8_t{0});
  EXPECT_EQ(classify(data, 1), (Bytes{1, 2}));
}

TEST(KnnClassifier, PredictsTheSameHoweverTheRowsAreCutIntoCalls) {
  std::mt19937 random(5);
  constexpr std::size_t kColumns = 50;
  const Bytes bytes = random_bytes(random, 1500 * kColumns, 250, 255);
  const std::vector<float> pixels(bytes.begin(), bytes.end());
  const Bytes labels = labels_by_index(1000);
  const auto classifier =
      KnnClassifier::make({std::span(pixels).first(1000 * kColumns), labels, kColumns}, 1);
  ASSERT_TRUE(classifier);
  const auto test = std::span(pixels).subspan(1000 * kColumns);
  Bytes whole(500);
  ASSERT_TRUE(classifier->classify(test, whole));
  Bytes parts(500);
  for (std::size_t row = 0; row < 500; row += 7) {
    const std::size_t count = std::min<std::size_t>(7, 500 - row);
    const auto some = test.subspan(row * kColumns, count * kColumns);
    ASSERT_TRUE(classifier->classify(some, std::span(parts).subspan(row, count)));
  }
  EXPECT_EQ(parts, whole);
  EXPECT_TRUE(classifier->classify({}, {}));
}

TEST(KnnClassifier, RefusesWhatItCannotClassifyExactly) {
  const Bytes labels(4);
  const std::vector<float> pixels(12, 1);
  const auto code = [&](std::span<const float> train, std::size_t columns, std::size_t k) {
    return code_of(KnnClassifier::make({train, labels, columns}, k));
  };
  EXPECT_EQ(code(pixels, 3, 4), Errc{});
  EXPECT_EQ(code(pixels, 3, 0), Errc::invalid_argument);
  EXPECT_EQ(code(pixels, 3, 5), Errc::invalid_argument);
  EXPECT_EQ(code(pixels, 4, 1), Errc::invalid_argument);
  EXPECT_EQ(code(std::span(pixels).first(11), 3, 1), Errc::invalid_argument);
  EXPECT_EQ(code({}, 0, 1), Errc::invalid_argument);
  EXPECT_EQ(code(std::vector<float>(4 * (kMaxColumns + 1)), kMaxColumns + 1, 1), Errc::invalid_argument);
}

TEST(KnnClassifier, RefusesPixelsThatAreNotWholeNumbersFrom0To255) {
  constexpr auto kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr auto kInfinity = std::numeric_limits<float>::infinity();
  const Bytes labels(4);
  const std::vector<float> good(12, 255);
  const auto classifier = KnnClassifier::make({good, labels, 3}, 1);
  ASSERT_TRUE(classifier);
  for (const float stranger : {-1.0F, 256.0F, 0.5F, 254.9999F, 1e-40F, -1e30F, 1e30F, kNan, kInfinity}) {
    std::vector<float> bad = good;
    bad[7] = stranger;
    EXPECT_EQ(code_of(KnnClassifier::make({bad, labels, 3}, 1)), Errc::invalid_argument) << stranger;
    Bytes predictions(4, 77);
    EXPECT_EQ(code_of(classifier->classify(bad, predictions)), Errc::invalid_argument) << stranger;
    EXPECT_EQ(predictions, Bytes(4, 77));
  }
  Bytes three(3);
  EXPECT_EQ(code_of(classifier->classify(good, three)), Errc::invalid_argument);
}

// ------------------------------------------------------------------------------------------------ read_idx

// 2 x 3 elements
Bytes plain_file() {
  return {0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 10, 11, 12, 13, 14, 255};
}

// Writes files into a directory of its own.
class IdxFileTest : public testing::Test {
 public:
  IdxFileTest() {
    std::string name = (std::filesystem::temp_directory_path() / "knn_test.XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::system_error(errno, std::generic_category(), "mkdtemp");
    directory_ = name;
  }
  IdxFileTest(const IdxFileTest&) = delete;
  IdxFileTest& operator=(const IdxFileTest&) = delete;
  IdxFileTest(IdxFileTest&&) = delete;
  IdxFileTest& operator=(IdxFileTest&&) = delete;
  ~IdxFileTest() override {
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }

 protected:
  [[nodiscard]] const std::filesystem::path& directory() const { return directory_; }

  // The content of a gzip file.
  [[nodiscard]] Bytes compress(const Bytes& plain) const {
    const auto file = directory_ / "compressed";
    const std::unique_ptr<gzFile_s, int (*)(gzFile)> out(gzopen(file.c_str(), "wb"), gzclose);
    gzwrite(out.get(), plain.data(), static_cast<unsigned>(plain.size()));
    gzflush(out.get(), Z_FINISH);
    std::ifstream in(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  [[nodiscard]] Result<IdxFile> read(const Bytes& content) const {
    const auto file = directory_ / "file.gz";
    std::ofstream out(file, std::ios::binary);
    std::ranges::copy(content, std::ostreambuf_iterator<char>(out));
    out.close();
    return read_idx(file);
  }

  void expect_invalid(const Bytes& content, const std::string& why) const {
    const auto file = read(content);
    ASSERT_FALSE(file) << why;
    EXPECT_EQ(file.error().code, Errc::invalid_file) << file.error().message;
    EXPECT_NE(file.error().message.find(why), std::string::npos) << file.error().message;
  }

 private:
  std::filesystem::path directory_;
};

TEST_F(IdxFileTest, ReadsDimensionsAndElements) {
  const auto file = read(compress(plain_file()));
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ(file->dims, (std::vector<std::size_t>{2, 3}));
  EXPECT_EQ(file->bytes, (Bytes{10, 11, 12, 13, 14, 255}));
  const auto empty = read(compress({0, 0, 8, 2, 0, 0, 0, 0, 255, 255, 255, 255}));
  ASSERT_TRUE(empty) << empty.error().message;
  EXPECT_EQ(empty->dims, (std::vector<std::size_t>{0, 0xffffffff}));
  EXPECT_TRUE(empty->bytes.empty());
}

TEST_F(IdxFileTest, ReadsMoreThanItsBufferHolds) {
  std::mt19937 random(6);
  const Bytes elements = random_bytes(random, 300'000, 0, 255);  // does not compress
  Bytes plain = {0, 0, 8, 1, 0, 4, 0x93, 0xe0};
  plain.insert(plain.end(), elements.begin(), elements.end());
  const auto file = read(compress(plain));
  ASSERT_TRUE(file) << file.error().message;
  EXPECT_EQ(file->bytes, elements);
}

TEST_F(IdxFileTest, SaysWhichFileIsMissing) {
  const auto file = read_idx(directory() / "absent.gz");
  ASSERT_FALSE(file);
  EXPECT_EQ(file.error().code, Errc::not_found);
  EXPECT_NE(file.error().message.find("absent.gz"), std::string::npos);
  EXPECT_EQ(code_of(read_idx(directory())), Errc::invalid_file);
}

TEST_F(IdxFileTest, RefusesFilesCutShortAnywhere) {
  const Bytes whole = compress(plain_file());
  for (std::size_t size = 0; size < whole.size(); ++size) {
    expect_invalid({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)}, "truncated");
  }
}

TEST_F(IdxFileTest, RefusesElementsThatDoNotFitTheDimensions) {
  const Bytes plain = plain_file();
  for (std::size_t size = 0; size < plain.size(); ++size) {
    expect_invalid(compress({plain.begin(), plain.begin() + static_cast<std::ptrdiff_t>(size)}), "truncated");
  }
  Bytes longer = plain;
  longer.push_back(0);
  expect_invalid(compress(longer), "more elements");
}

TEST_F(IdxFileTest, RefusesWhatFollowsTheStream) {
  Bytes content = compress(plain_file());
  content.push_back('\n');
  expect_invalid(content, "follows");
}

TEST_F(IdxFileTest, RefusesOtherFormats) {
  expect_invalid(plain_file(), "header");  // not compressed
  expect_invalid(compress({'P', 'K', 3, 4, 0, 0, 0, 0}), "magic");
  expect_invalid(compress({0, 1, 8, 1, 0, 0, 0, 0}), "magic");
  expect_invalid(compress({0, 0, 13, 1, 0, 0, 0, 0}), "0x0d");  // floats
  expect_invalid(compress({0, 0, 8, 0}), "without dimensions");
}

TEST_F(IdxFileTest, RefusesADamagedStream) {
  Bytes content = compress(plain_file());
  content[content.size() - 8] ^= 1;  // first byte of the checksum
  expect_invalid(content, "check");
}

TEST_F(IdxFileTest, RefusesDimensionsTooLargeForTheFile) {
  expect_invalid(compress({0, 0, 8, 1, 0x10, 0, 0, 0}), "too large");
  // 2^64 elements, and nearly 2^128: products that are 0 in 64 bits
  expect_invalid(compress({0, 0, 8, 4, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0}), "too large");
  expect_invalid(compress({0, 0, 8, 4, 255, 0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0}), "too large");
}

// ----------------------------------------------------------------------------------------- the real data

// Each costs 47 million steps, which sanitizers make up to a hundred times slower.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kSearchedRows = 3;
#else
constexpr std::size_t kSearchedRows = 100;
#endif

IdxFile read_dataset(const char* name) {
  auto file = read_idx(std::filesystem::path(kFashionMnist) / name);
  if (!file) throw std::runtime_error(file.error().message);
  return std::move(*file);
}

TEST(FashionMnist, AgreesWithSortingOnTheFirstTestRows) {
  if (!std::filesystem::exists(kFashionMnist)) GTEST_SKIP() << "needs the package dataset-fashion-mnist";
  IdxFile train = read_dataset("train-images-idx3-ubyte.gz");
  IdxFile labels = read_dataset("train-labels-idx1-ubyte.gz");
  IdxFile test = read_dataset("t10k-images-idx3-ubyte.gz");
  ASSERT_EQ(train.dims, (std::vector<std::size_t>{60000, 28, 28}));
  ASSERT_EQ(labels.dims, (std::vector<std::size_t>{60000}));
  ASSERT_EQ(test.dims, (std::vector<std::size_t>{10000, 28, 28}));
  test.bytes.resize(kSearchedRows * 784);
  const Data data{std::move(train.bytes), std::move(labels.bytes), std::move(test.bytes), 784};
  expect_exact(data, {1, 5});
}

}  // namespace
}  // namespace cowmgr::knn
