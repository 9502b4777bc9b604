#include "client/examples/knn/fashion_mnist.hpp"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "client/examples/knn/knn.hpp"

namespace cowmgr::knn {
namespace {

Result<LabelledImages> load(const std::filesystem::path& images_path,
                            const std::filesystem::path& labels_path) {
  auto images = read_idx(images_path);
  if (!images) return error_of(images);
  auto labels = read_idx(labels_path);
  if (!labels) return error_of(labels);
  const auto invalid = [](const std::filesystem::path& path, const char* why) {
    return fail(Errc::invalid_file, fmt::format("{}: {}", path.string(), why));
  };
  if (images->dims.size() != 3) return invalid(images_path, "not images: it does not have three dimensions");
  if (labels->dims.size() != 1) return invalid(labels_path, "not labels: it has more than one dimension");
  if (images->bytes.empty()) return invalid(images_path, "no image in it");
  if (labels->bytes.size() != images->dims[0]) return invalid(labels_path, "not one label for each image");
  return LabelledImages{*std::move(images), std::move(labels->bytes)};
}

}  // namespace

Result<FashionMnist> load_fashion_mnist(const std::filesystem::path& directory) {
  auto train = load(directory / "train-images-idx3-ubyte.gz", directory / "train-labels-idx1-ubyte.gz");
  if (!train) return error_of(train);
  auto test = load(directory / "t10k-images-idx3-ubyte.gz", directory / "t10k-labels-idx1-ubyte.gz");
  if (!test) return error_of(test);
  if (train->columns() != test->columns() || train->columns() > kMaxColumns) {
    return fail(
        Errc::invalid_file,
        fmt::format("{}: images of {} pixels to learn from, and of {} to classify; both must have the same "
                    "number, at most {}",
                    directory.string(), train->columns(), test->columns(), kMaxColumns));
  }
  return FashionMnist{*std::move(train), *std::move(test)};
}

void truncate(LabelledImages& data, std::size_t rows) {
  COWMGR_ASSERT(rows <= data.rows());
  data.images.bytes.resize(rows * data.columns());
  data.images.dims[0] = rows;
  data.labels.resize(rows);
}

Result<void> put_images(const Client& client, const std::string& name, const LabelledImages& data) {
  auto writer = client.create(name, {Dtype::of<float>(), {data.rows(), data.columns()}});
  if (!writer) return error_of(writer);
  const auto pixels = writer->as<float>();
  if (!pixels) return error_of(pixels);
  std::ranges::transform(data.images.bytes, pixels->begin(),
                         [](std::uint8_t pixel) { return static_cast<float>(pixel); });
  const auto view = writer->seal();
  if (!view) return error_of(view);
  return {};
}

}  // namespace cowmgr::knn
