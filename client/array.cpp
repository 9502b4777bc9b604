#include "cowmgr/array.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "client/handles.hpp"
#include "proto/checksum.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

constexpr std::size_t kVerifyBytes = std::size_t{8} << 20;  // between two calls of `show`

}  // namespace

namespace detail {

Result<void> check_dtype(const Dtype& dtype, const Dtype& wanted) {
  if (dtype == wanted) return {};
  return fail(Errc::invalid_dtype, fmt::format("the array holds {}, not {}", dtype.str(), wanted.str()));
}

Result<void> check_process(std::uint64_t generation) {
  if (generation == fork_generation()) return {};
  return fail(Errc::wrong_process, "this handle belongs to the parent of this forked process; make one here");
}

// ---- ArrayImpl ----

ArrayImpl::~ArrayImpl() {
  const bool is_ours = generation_ == fork_generation();
  mapping_.reset();
  connection_->mappings().forget(info_.id);
  if (is_ours) connection_->release_view(info_.id);
}

Result<std::vector<std::unique_ptr<ArrayImpl>>> ArrayImpl::attach(
    const std::shared_ptr<Connection>& connection, const std::vector<std::uint64_t>& ids, View view) {
  return connection->call<wire::Arrays>(
      [&](Builder& b) { return wire::CreateAttachDirect(b, nullptr, &ids); },
      [&](auto& reply) { return take_all(connection, reply, ids.size(), view); });
}

Result<std::vector<std::unique_ptr<ArrayImpl>>> ArrayImpl::take_all(
    const std::shared_ptr<Connection>& connection, Connection::Reply<wire::Arrays>& reply, std::size_t count,
    View view) {
  const auto* tables = reply->arrays();
  if (tables == nullptr || tables->size() != count || reply.fds().size() != count)
    return fail(Errc::protocol_error, "the daemon sent other arrays, or descriptors, than were asked for");
  std::vector<std::unique_ptr<ArrayImpl>> arrays;
  for (flatbuffers::uoffset_t i = 0; i < tables->size(); ++i) {
    auto info = info_of(*tables->Get(i));
    if (!info) return error_of(std::move(info));
    auto mapping = connection->mappings().map(*info, reply.fds()[i].get(), view);
    if (!mapping) return error_of(std::move(mapping));
    arrays.push_back(std::make_unique<ArrayImpl>(connection, *std::move(info), *std::move(mapping), view));
  }
  reply.keep();
  for (const auto& array : arrays) array->hold();
  return arrays;
}

// ---- WriterImpl ----

Result<std::unique_ptr<WriterImpl>> WriterImpl::take(const std::shared_ptr<Connection>& connection,
                                                     Connection::Reply<wire::Created>& reply,
                                                     const WritingRequest& request) {
  if (reply->array() == nullptr || reply.fds().size() != 2)
    return fail(Errc::protocol_error, "the daemon made an array without its memory");
  auto info = info_of(*reply->array());
  if (!info) return error_of(std::move(info));
  if (info->data_bytes != data_bytes(request.spec).value_or(0))
    return fail(Errc::protocol_error, "the daemon made another array than was asked for");
  auto mapping = map_segment(reply.fds()[0].get(), info->segment_bytes, data_end(*info), Access::read_write);
  if (!mapping) return error_of(std::move(mapping));
  auto writer = std::make_unique<WriterImpl>(connection, *std::move(info), *std::move(mapping),
                                             std::move(reply.fds()[1]), request.options.checksum);
  reply.keep(&request);
  writer->hold();
  return writer;
}

WriterImpl::~WriterImpl() {
  if (generation_ != fork_generation()) {
    // The writable mapping does not exist in a child (MADV_DONTFORK); something else may lie there by now.
    if (!is_read_only_) (void)new Mapping(std::move(mapping_));
    return;
  }
  if (!is_held_) return;
  connection_->remove_writing(info_.id);
  mapping_ = Mapping();
  reader_.reset();
  (void)connection_->give_back({.array = info_.id});
}

Result<std::unique_ptr<ArrayImpl>> WriterImpl::seal() {
  if (auto ok = check_process(generation_); !ok) return error_of(std::move(ok));
  if (!is_read_only_) {
    if (auto ok = mapping_.make_read_only(reader_.get()); !ok) return error_of(std::move(ok));
    is_read_only_ = true;
    reader_.reset();
    if (wants_checksum_) info_.checksum = checksum_of(data());
  }
  auto sealed = connection_->call<wire::Arrays>(
      [&](Builder& b) { return wire::CreateSealArray(b, info_.id, info_.checksum); },
      [&](auto& reply) { return take_sealed(reply); });
  // An earlier daemon may have sealed it before it could say so, or this one after we stopped waiting.
  if (sealed || sealed.error().code != Errc::not_holder) return sealed;
  auto found = find_sealed();
  return found ? std::move(found) : std::move(sealed);
}

Result<std::unique_ptr<ArrayImpl>> WriterImpl::take_sealed(Connection::Reply<wire::Arrays>& reply) {
  is_held_ = false;
  connection_->remove_writing(info_.id);
  if (reply->arrays() == nullptr || reply->arrays()->size() != 1 || reply->arrays()->Get(0)->id() != info_.id)
    return fail(Errc::protocol_error, "the daemon's answer to a seal is malformed");
  auto info = info_of(*reply->arrays()->Get(0));
  if (!info) return error_of(std::move(info));
  auto mapping = std::make_shared<Mapping>();
  auto array = std::make_unique<ArrayImpl>(connection_, *std::move(info), mapping, View::shared);
  reply.keep();
  array->hold();
  *mapping = std::move(mapping_);  // pointers into it stay valid
  connection_->mappings().keep(info_.id, mapping);
  return array;
}

Result<std::unique_ptr<ArrayImpl>> WriterImpl::find_sealed() {
  auto sealed = ArrayImpl::attach(connection_, {info_.id}, View::shared);
  if (!sealed) return error_of(std::move(sealed));
  is_held_ = false;
  connection_->remove_writing(info_.id);
  auto mapping = std::make_shared<Mapping>(std::move(mapping_));
  connection_->mappings().keep(info_.id, mapping);
  sealed->front()->use(std::move(mapping));
  return std::move(sealed->front());
}

}  // namespace detail

// ---- Array ----

Array::Array(std::unique_ptr<detail::ArrayImpl> impl) noexcept : impl_(std::move(impl)) {}
Array::Array(Array&&) noexcept = default;
Array& Array::operator=(Array&&) noexcept = default;
Array::~Array() = default;

const std::string& Array::name() const noexcept {
  return impl_->info().name;
}
std::uint64_t Array::version() const noexcept {
  return impl_->info().version;
}
std::uint64_t Array::id() const noexcept {
  return impl_->info().id;
}
const ArraySpec& Array::spec() const noexcept {
  return impl_->info().spec;
}
std::span<const std::byte> Array::bytes() const noexcept {
  return impl_->data();
}
std::span<std::byte> Array::data() const noexcept {
  return impl_->data();
}

Result<void> Array::verify(const std::function<void(std::uint64_t)>& show) const {
  const std::uint64_t wanted = impl_->info().checksum;
  if (wanted == 0)
    return fail(Errc::unsupported,
                fmt::format("array {} has no checksum; it takes one when it is put", printable(name())));
  Checksum checksum;
  const auto data = bytes();
  for (std::size_t done = 0; done < data.size();) {
    const auto piece = data.subspan(done, std::min(kVerifyBytes, data.size() - done));
    checksum.add(piece);
    done += piece.size();
    if (show) show(done);
  }
  if (checksum.value() == wanted) return {};
  return fail(Errc::corrupted, fmt::format("the data of array {} does not match its checksum; put it again",
                                           printable(name())));
}

Result<std::span<std::byte>> Array::mutable_bytes() {
  if (impl_->view() == View::copy_on_write) return impl_->data();
  return fail(
      Errc::permission_denied,
      "this view is shared and read-only; attach with View::copy_on_write to write to a private copy");
}

// ---- ArrayWriter ----

ArrayWriter::ArrayWriter(std::unique_ptr<detail::WriterImpl> impl) noexcept : impl_(std::move(impl)) {}
ArrayWriter::ArrayWriter(ArrayWriter&&) noexcept = default;
ArrayWriter& ArrayWriter::operator=(ArrayWriter&&) noexcept = default;
ArrayWriter::~ArrayWriter() = default;

const ArraySpec& ArrayWriter::spec() const noexcept {
  return impl_->info().spec;
}
std::span<std::byte> ArrayWriter::bytes() const noexcept {
  return impl_->data();
}

Result<Array> ArrayWriter::seal() {
  if (!impl_) return fail(Errc::not_holder, "this writer has sealed its array already");
  auto array = impl_->seal();
  if (!array) return error_of(std::move(array));
  impl_.reset();
  return Array(*std::move(array));
}

}  // namespace cowmgr
