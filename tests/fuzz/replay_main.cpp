// Runs a fuzzer without libFuzzer, so that every build checks what fuzzing found. Usage: replay_<name>
// DIRECTORY...
//
// 1. Each file of the directories is run as it is, then kMutations times changed at random.
// 2. The same files give the same runs everywhere: files are sorted, and each is mutated from a seed of its
// own.
// 3. When a run dies, the last line says which: file and number of the mutation.
#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <unistd.h>
#include <vector>

#include "tests/fuzz/fuzz.hpp"

namespace {

constexpr unsigned kMutations = 1000;  // of each file: about a second a corpus, ten under a sanitizer

using Bytes = std::vector<std::uint8_t>;

struct File {
  std::string path;
  Bytes bytes;
};

std::vector<File> read_files(const std::vector<std::string>& directories) {
  std::vector<File> files;
  for (const auto& directory : directories) {
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
      std::ifstream in(entry.path(), std::ios::binary);
      files.push_back({entry.path().string(), Bytes(std::istreambuf_iterator<char>(in), {})});
    }
  }
  std::sort(files.begin(), files.end(), [](const File& a, const File& b) { return a.path < b.path; });
  return files;
}

// FNV-1a.
std::uint32_t seed_of(const Bytes& bytes) {
  std::uint32_t hash = 2166136261U;
  for (const auto byte : bytes) hash = (hash ^ byte) * 16777619U;
  return hash;
}

// Changes bytes the way hostile ones differ: bits, extreme numbers, pieces lost, doubled, or from another
// file.
class Mutator {
 public:
  Mutator(std::uint32_t seed, const std::vector<File>& files) : random_(seed), files_(files) {}

  Bytes mutate(Bytes bytes) {
    for (auto rounds = 1 + below(4); rounds > 0; --rounds) mutate_once(bytes);
    return bytes;
  }

 private:
  void mutate_once(Bytes& bytes) {
    const auto at = below(bytes.size() + 1);
    const auto length = std::min(1 + below(16), bytes.size() - at);
    const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(at);
    const auto end = begin + static_cast<std::ptrdiff_t>(length);
    switch (below(6)) {
      case 0:
        if (length > 0) *begin = static_cast<std::uint8_t>(*begin ^ 1U << below(8));
        break;
      case 1:
        std::fill(begin, end, extreme());
        break;
      case 2:
        bytes.erase(begin, end);
        break;
      case 3:
        bytes.resize(at);
        break;
      case 4: {
        const Bytes piece(begin, end);
        bytes.insert(begin, piece.begin(), piece.end());
        break;
      }
      default:
        splice(bytes, at);
    }
  }

  void splice(Bytes& bytes, std::size_t at) {
    const auto& other = files_[below(files_.size())].bytes;
    const auto from = below(other.size() + 1);
    const auto length = std::min(below(64), other.size() - from);
    const auto begin = other.begin() + static_cast<std::ptrdiff_t>(from);
    bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at), begin,
                 begin + static_cast<std::ptrdiff_t>(length));
  }

  std::uint8_t extreme() {
    constexpr std::uint8_t kExtremes[] = {0x00, 0x01, 0x7F, 0x80, 0xFF, '0', '9', '(', '[', '\'', '\\', ','};
    return kExtremes[below(std::size(kExtremes))];
  }

  std::size_t below(std::size_t limit) { return random_() % limit; }

  std::mt19937 random_;  // the same numbers in every standard library
  const std::vector<File>& files_;
};

// What is running, for a handler of signals to say.
std::array<char, 512>& run_name() {
  static std::array<char, 512> name{};
  return name;
}

// Only write(2) may be called here (signal-safety(7)).
void say_where(int signal) {
  const auto& name = run_name();
  if (::write(STDERR_FILENO, name.data(), std::char_traits<char>::length(name.data())) < 0) ::_exit(1);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void run(const File& file, unsigned mutation, const Bytes& bytes) {
  auto& name = run_name();
  std::snprintf(name.data(), name.size(), "replay: died in %s, mutation %u\n", file.path.c_str(), mutation);
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  const auto files = read_files({argv + 1, argv + argc});
  if (files.empty()) {
    std::fprintf(stderr, "replay: no files; usage: replay_<name> DIRECTORY...\n");
    return EXIT_FAILURE;
  }
  std::signal(SIGABRT, say_where);
  for (const auto& file : files) {
    Mutator mutator(seed_of(file.bytes), files);
    run(file, 0, file.bytes);
    for (unsigned mutation = 1; mutation <= kMutations; ++mutation)
      run(file, mutation, mutator.mutate(file.bytes));
  }
  std::printf("replay: %zu files, %u mutations of each\n", files.size(), kMutations);
  return EXIT_SUCCESS;
}
