// A frame from a stranger, as a request and as a reply: what verifies can be read to the last byte.
#include <cstring>
#include <vector>

#include <flatbuffers/minireflect.h>

#include "proto/frames.hpp"
#include "tests/fuzz/fuzz.hpp"

namespace cowmgr {
namespace {

// Reads every field that the schema knows, also those that it will know one day: the walk follows its type
// tables.
class Reader final : public flatbuffers::IterationVisitor {
 public:
  void UType(uint8_t value, const char*) override { see(value); }
  void Bool(bool value) override { see(value); }
  void Char(int8_t value, const char*) override { see(value); }
  void UChar(uint8_t value, const char*) override { see(value); }
  void Short(int16_t value, const char*) override { see(value); }
  void UShort(uint16_t value, const char*) override { see(value); }
  void Int(int32_t value, const char*) override { see(value); }
  void UInt(uint32_t value, const char*) override { see(value); }
  void Long(int64_t value) override { see(value); }
  void ULong(uint64_t value) override { see(value); }
  void Float(float value) override { see(value); }
  void Double(double value) override { see(value); }
  // Both ends are enough: thousands of fields may share one long string.
  void String(const flatbuffers::String* value) override {
    const std::string_view text(value->c_str(), value->size());
    COWMGR_ASSERT(value->c_str()[value->size()] == '\0');
    if (!text.empty()) see(text.front() + text.back());
  }

 private:
  template <class T>
  void see(T value) {
    volatile T seen = value;
    static_cast<void>(seen);
  }
};

template <class Root>
void check(std::span<const std::byte> frame) {
  const auto* root = verified_root<Root>(frame);
  if (root == nullptr) return;
  static_cast<void>(root->body());
  if (root->body_type() == decltype(root->body_type())::NONE)
    return;  // the walk wants a type before the body
  Reader reader;
  flatbuffers::IterateObject(reinterpret_cast<const uint8_t*>(root), Root::MiniReflectTypeTable(), &reader);
}

}  // namespace
}  // namespace cowmgr

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::uint64_t> aligned(size / sizeof(std::uint64_t) + 1);  // as a receive buffer is
  if (size > 0) std::memcpy(aligned.data(), data, size);
  const auto frame = std::as_bytes(std::span(aligned)).first(size);
  cowmgr::check<cowmgr::wire::Request>(frame);
  cowmgr::check<cowmgr::wire::Reply>(frame);
  return 0;
}
