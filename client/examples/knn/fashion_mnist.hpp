// The data of the demo: from its files into shared arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "client/examples/knn/idx_file.hpp"
#include "cowmgr/client.hpp"

namespace cowmgr::knn {

struct LabelledImages {
  IdxFile images;                    // rows, height, width
  std::vector<std::uint8_t> labels;  // one for each row

  [[nodiscard]] std::size_t rows() const noexcept { return labels.size(); }
  [[nodiscard]] std::size_t columns() const noexcept { return images.dims[1] * images.dims[2]; }
};

struct FashionMnist {
  LabelledImages train;
  LabelledImages test;  // as wide as those of `train`
};

// Reads the four files of `directory`, which have the names that all relatives of MNIST have. Blocks for half
// a second. Errors: as read_idx(); invalid_file if the files do not fit each other.
[[nodiscard]] Result<FashionMnist> load_fashion_mnist(const std::filesystem::path& directory);

// Forgets all but the first `rows`.
void truncate(LabelledImages& data, std::size_t rows);

// Puts the images as one array of float32, a row for each image, converted straight into the shared memory.
// This process has no view of it afterwards. Errors: as Client::create() and ArrayWriter::seal().
[[nodiscard]] Result<void> put_images(const Client& client, const std::string& name,
                                      const LabelledImages& data);

}  // namespace cowmgr::knn
