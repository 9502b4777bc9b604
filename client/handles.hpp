// What stands behind the public handles: the daemon's id of a thing, and this process's mapping of it.
#pragma once

#include <memory>
#include <mutex>
#include <span>

#include "client/connection.hpp"
#include "cowmgr/array.hpp"
#include "cowmgr/results.hpp"
#include "proto/segment.hpp"

namespace cowmgr::detail {

[[nodiscard]] Result<ArrayInfo> info_of(const wire::ArrayInfo& table);
[[nodiscard]] Result<ResultsInfo> info_of(const wire::ResultsInfo& table);
[[nodiscard]] ClientInfo info_of(const wire::ClientInfo& table);
[[nodiscard]] DaemonInfo info_of(const wire::Pong& table);
[[nodiscard]] std::vector<std::string> strings_of(
    const flatbuffers::Vector<Offset<flatbuffers::String>>* texts);

// The data of a mapped segment.
[[nodiscard]] inline std::span<std::byte> data_of(const Mapping& mapping, std::uint64_t data_bytes) noexcept {
  return {mapping.data() + kDataOffset, data_bytes};
}

// Refuses to work on what the parent of this forked process holds.
[[nodiscard]] Result<void> check_process(std::uint64_t generation);

class ArrayImpl {
 public:
  ArrayImpl(std::shared_ptr<Connection> connection, ArrayInfo info, std::shared_ptr<Mapping> mapping,
            View view)
      : connection_(std::move(connection)),
        info_(std::move(info)),
        mapping_(std::move(mapping)),
        view_(view) {}
  ArrayImpl(const ArrayImpl&) = delete;
  ArrayImpl& operator=(const ArrayImpl&) = delete;
  ~ArrayImpl();

  [[nodiscard]] const ArrayInfo& info() const noexcept { return info_; }
  [[nodiscard]] View view() const noexcept { return view_; }
  [[nodiscard]] std::span<std::byte> data() const noexcept { return data_of(*mapping_, info_.data_bytes); }

  // A view for each array of a reply to Attach or SealArray.
  [[nodiscard]] static Result<std::vector<std::unique_ptr<ArrayImpl>>> map_all(
      const std::shared_ptr<Connection>& connection, const Connection::Reply<wire::Arrays>& reply, View view);

 private:
  std::shared_ptr<Connection> connection_;
  ArrayInfo info_;
  std::shared_ptr<Mapping> mapping_;
  View view_;
  std::uint64_t generation_ = fork_generation();
};

class WriterImpl {
 public:
  WriterImpl(std::shared_ptr<Connection> connection, ArrayInfo info, Mapping mapping, UniqueFd reader)
      : connection_(std::move(connection)),
        info_(std::move(info)),
        mapping_(std::move(mapping)),
        reader_(std::move(reader)) {}
  WriterImpl(const WriterImpl&) = delete;
  WriterImpl& operator=(const WriterImpl&) = delete;
  ~WriterImpl();

  [[nodiscard]] const ArrayInfo& info() const noexcept { return info_; }
  [[nodiscard]] std::span<std::byte> data() const noexcept { return data_of(mapping_, info_.data_bytes); }
  [[nodiscard]] Result<std::unique_ptr<ArrayImpl>> seal();

 private:
  std::shared_ptr<Connection> connection_;
  ArrayInfo info_;
  Mapping mapping_;
  UniqueFd reader_;  // O_RDONLY, for the mapping that takes the place of the writable one
  bool is_read_only_ = false;
  bool is_sealed_ = false;
  std::uint64_t generation_ = fork_generation();
};

// The writable mapping of a set that all slots of this process share.
class ResultSetImpl : public std::enable_shared_from_this<ResultSetImpl> {
 public:
  ResultSetImpl(std::shared_ptr<Connection> connection, ResultsInfo info)
      : connection_(std::move(connection)), info_(std::move(info)) {}

  [[nodiscard]] const ResultsInfo& info() const noexcept { return info_; }
  [[nodiscard]] Result<ResultsInfo> ask(std::uint64_t seen, std::uint32_t wait_ms) const;
  [[nodiscard]] Result<std::vector<std::unique_ptr<ArrayImpl>>> attach() const;

  // A slot, or none when every slot is settled; `index` -1: any. Errors: timed_out.
  [[nodiscard]] Result<std::unique_ptr<SlotImpl>> lease(std::int64_t index, Milliseconds wait);

 private:
  friend class SlotImpl;
  using LeaseReply = Connection::Reply<wire::Leased>;
  [[nodiscard]] Result<std::unique_ptr<SlotImpl>> take_slot(const LeaseReply& reply,
                                                            std::shared_ptr<Mapping> mapping);
  [[nodiscard]] Result<std::shared_ptr<Mapping>> mapping_for(const LeaseReply& reply);

  std::shared_ptr<Connection> connection_;
  ResultsInfo info_;
  // Held while a slot ends, its request included: the daemon must hear of the ends in the order in which the
  // slots let go of the mapping, or "nobody here has it mapped any more" may come too early.
  std::mutex ending_;
  std::mutex mapping_mutex_;
  std::weak_ptr<Mapping> mapping_;
  std::uint64_t generation_ = fork_generation();
};

class SlotImpl {
 public:
  SlotImpl(std::shared_ptr<ResultSetImpl> set, const wire::Leased& lease, std::shared_ptr<Mapping> mapping);
  SlotImpl(const SlotImpl&) = delete;
  SlotImpl& operator=(const SlotImpl&) = delete;
  ~SlotImpl();

  [[nodiscard]] std::uint64_t index() const noexcept { return index_; }
  [[nodiscard]] std::uint32_t attempt() const noexcept { return attempt_; }
  [[nodiscard]] Rows rows() const noexcept { return rows_; }
  [[nodiscard]] const Dtype& dtype() const noexcept { return set_->info().spec.dtype; }
  [[nodiscard]] std::span<std::byte> bytes() const noexcept;

  [[nodiscard]] Result<void> commit();
  // Another slot if one is free at once, else none: ask the set then.
  [[nodiscard]] Result<std::unique_ptr<SlotImpl>> commit_and_take();
  [[nodiscard]] Result<void> fail(std::string_view message);
  [[nodiscard]] const std::shared_ptr<ResultSetImpl>& set() const noexcept { return set_; }

 private:
  void give_back() noexcept;
  [[nodiscard]] bool let_go() noexcept;

  std::shared_ptr<ResultSetImpl> set_;
  std::uint64_t index_;
  std::uint32_t attempt_;
  Rows rows_;
  std::shared_ptr<Mapping> mapping_;  // null: the slot is spent
  std::uint64_t generation_ = fork_generation();
};

}  // namespace cowmgr::detail
