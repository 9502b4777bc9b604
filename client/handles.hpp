// What stands behind the public handles: the daemon's id of a thing, and this process's mapping of it.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "client/connection.hpp"
#include "client/mappings.hpp"
#include "cowmgr/array.hpp"
#include "cowmgr/results.hpp"
#include "proto/result_segment.hpp"
#include "proto/segment.hpp"

namespace cowmgr::detail {

[[nodiscard]] Result<ArrayInfo> info_of(const wire::ArrayInfo& table);
[[nodiscard]] Result<ResultsInfo> info_of(const wire::ResultsInfo& table);
[[nodiscard]] ClientInfo info_of(const wire::ClientInfo& table);
[[nodiscard]] DaemonInfo info_of(const wire::Pong& table);
[[nodiscard]] std::vector<std::string> strings_of(
    const flatbuffers::Vector<Offset<flatbuffers::String>>* texts);

// The handles below are made while the reply that grants what they hold is in hand: they answer for it from
// hold() on, which cannot fail, once that was kept.

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

  void hold() noexcept { generation_ = fork_generation(); }
  [[nodiscard]] const ArrayInfo& info() const noexcept { return info_; }
  [[nodiscard]] View view() const noexcept { return view_; }
  // Another mapping of the same array takes the place of this one's.
  void use(std::shared_ptr<Mapping> mapping) noexcept { mapping_ = std::move(mapping); }
  [[nodiscard]] std::span<std::byte> data() const noexcept { return data_of(*mapping_, info_); }

  // Views of the versions with these ids.
  [[nodiscard]] static Result<std::vector<std::unique_ptr<ArrayImpl>>> attach(
      const std::shared_ptr<Connection>& connection, const std::vector<std::uint64_t>& ids, View view);
  // Takes the reply to an Attach: a view of each of the `count` arrays.
  [[nodiscard]] static Result<std::vector<std::unique_ptr<ArrayImpl>>> take_all(
      const std::shared_ptr<Connection>& connection, Connection::Reply<wire::Arrays>& reply,
      std::size_t count, View view);

 private:
  std::shared_ptr<Connection> connection_;
  ArrayInfo info_;
  std::shared_ptr<Mapping> mapping_;
  View view_;
  std::uint64_t generation_ = 0;  // that holds the view
};

class WriterImpl {
 public:
  // Takes the reply to a MakeArray.
  [[nodiscard]] static Result<std::unique_ptr<WriterImpl>> take(const std::shared_ptr<Connection>& connection,
                                                                Connection::Reply<wire::Created>& reply,
                                                                const WritingRequest& request);
  WriterImpl(std::shared_ptr<Connection> connection, ArrayInfo info, Mapping mapping, UniqueFd reader,
             bool wants_checksum)
      : connection_(std::move(connection)),
        info_(std::move(info)),
        mapping_(std::move(mapping)),
        reader_(std::move(reader)),
        wants_checksum_(wants_checksum) {}
  WriterImpl(const WriterImpl&) = delete;
  WriterImpl& operator=(const WriterImpl&) = delete;
  ~WriterImpl();

  void hold() noexcept { is_held_ = true; }
  [[nodiscard]] const ArrayInfo& info() const noexcept { return info_; }
  [[nodiscard]] std::span<std::byte> data() const noexcept { return data_of(mapping_, info_); }
  [[nodiscard]] Result<std::unique_ptr<ArrayImpl>> seal();

 private:
  [[nodiscard]] Result<std::unique_ptr<ArrayImpl>> take_sealed(Connection::Reply<wire::Arrays>& reply);
  [[nodiscard]] Result<std::unique_ptr<ArrayImpl>> find_sealed();

  std::shared_ptr<Connection> connection_;
  ArrayInfo info_;
  Mapping mapping_;
  UniqueFd reader_;  // O_RDONLY, for the mapping that takes the place of the writable one
  bool wants_checksum_;
  bool is_read_only_ = false;
  bool is_held_ = false;  // until it is sealed
  std::uint64_t generation_ = fork_generation();
};

class SlotImpl;
using Slots = std::vector<std::unique_ptr<SlotImpl>>;

// Whether a refusal means that the slot is not this session's any more.
[[nodiscard]] constexpr bool is_lost(Errc code) noexcept {
  return code == Errc::not_holder || code == Errc::already_committed || code == Errc::slot_failed ||
         code == Errc::not_found;
}

// A result set, its own segment, and of a dense one the writable mapping that all slots of this process
// share.
class ResultSetImpl : public std::enable_shared_from_this<ResultSetImpl> {
 public:
  // Takes the reply to MakeResults or OpenResults.
  [[nodiscard]] static Result<std::shared_ptr<ResultSetImpl>> take(std::shared_ptr<Connection> connection,
                                                                   Connection::Reply<wire::Results>& reply);
  ResultSetImpl(std::shared_ptr<Connection> connection, ResultsInfo info, Mapping memory, ResultSegment table)
      : connection_(std::move(connection)),
        info_(std::move(info)),
        memory_(std::move(memory)),
        table_(table) {}

  [[nodiscard]] const ResultsInfo& info() const noexcept { return info_; }
  [[nodiscard]] const ResultSegment& table() const noexcept { return table_; }

  struct Wait {
    std::uint64_t seen = 0;              // revision
    std::uint64_t settled = UINT64_MAX;  // answered when more slots are settled
    std::uint32_t pace_ms = 0;           // no answer before, unless the set has ended
  };
  [[nodiscard]] Patience patience(Milliseconds wait) const { return connection_->patience(wait); }
  // The set now.
  [[nodiscard]] Result<ResultsInfo> ask() const;
  // The set when it is as `wait` says, or as much later as one request of `patience` may be answered.
  [[nodiscard]] Result<ResultsInfo> ask(Patience& patience, const Wait& wait) const;
  [[nodiscard]] Result<void> cancel(bool forget) const;
  [[nodiscard]] Result<std::vector<std::unique_ptr<ArrayImpl>>> attach(
      const std::vector<std::uint64_t>& ids) const {
    return ArrayImpl::attach(connection_, ids, View::shared);
  }

  // How many slots a request shall bring.
  struct Batch {
    std::uint32_t count = 1;
    bool is_shared = false;  // fewer, if others want some
  };
  // Slots, or none when every slot is settled; `index` -1: any. Errors: timed_out, and the daemon's.
  [[nodiscard]] Result<Slots> lease(std::int64_t index, const Batch& batch, Milliseconds wait);

  struct Committed {
    Slots next;
    struct Refusal {
      std::uint64_t slot = 0;
      Error error;
    };
    std::vector<Refusal> refused;
  };
  // Commits `done`, whose values fit a frame, and leases `next` slots, or none for 0. The slots are spent.
  [[nodiscard]] Result<Committed> commit(Slots& done, const Batch& next, Milliseconds wait = kForever);
  [[nodiscard]] Result<void> fail(SlotImpl& slot, std::string_view message, Retry retry);
  void give_back(SlotImpl& slot) noexcept;
  // The slot is not leased to this process any more.
  void forget(std::uint64_t slot, std::uint32_t attempt) const noexcept;
  [[nodiscard]] Result<void> allocate(SlotImpl& slot, const ArraySpec& spec);

 private:
  using LeaseReply = Connection::Reply<wire::Leased>;
  [[nodiscard]] Result<Slots> take_slots(LeaseReply& reply, std::shared_ptr<Mapping> mapping);
  [[nodiscard]] Result<std::shared_ptr<Mapping>> mapping_for(LeaseReply& reply);
  [[nodiscard]] Result<Committed> take_committed(LeaseReply& reply, const Slots& done,
                                                 std::shared_ptr<Mapping>& mapping);
  [[nodiscard]] bool is_mapped();
  void tell_unmapped(bool kept_mapping);

  std::shared_ptr<Connection> connection_;
  ResultsInfo info_;
  Mapping memory_;  // of the set's own segment
  ResultSegment table_;
  // Guarded by pool_mutex().
  std::weak_ptr<Mapping> mapping_;
  std::uint64_t generation_ = fork_generation();
};

class SlotImpl {
 public:
  SlotImpl(std::shared_ptr<ResultSetImpl> set, const wire::SlotLease& lease,
           std::shared_ptr<Mapping> mapping);
  SlotImpl(const SlotImpl&) = delete;
  SlotImpl& operator=(const SlotImpl&) = delete;
  ~SlotImpl();

  void hold() noexcept { is_spent_ = false; }
  [[nodiscard]] std::uint64_t index() const noexcept { return index_; }
  [[nodiscard]] std::uint32_t attempt() const noexcept { return attempt_; }
  [[nodiscard]] Rows rows() const noexcept;
  [[nodiscard]] const Dtype& dtype() const noexcept;
  [[nodiscard]] std::span<std::byte> bytes() const noexcept;
  [[nodiscard]] const std::shared_ptr<ResultSetImpl>& set() const noexcept { return set_; }

  // Errors: wrong_process in a forked child; already_committed for a slot that is spent.
  [[nodiscard]] Result<void> check_usable() const;
  [[nodiscard]] Result<void> set_value(std::span<const std::byte> value);
  [[nodiscard]] const std::vector<std::byte>& value() const noexcept { return value_; }
  [[nodiscard]] bool has_array() const noexcept { return allocation_.has_value(); }

 private:
  friend class ResultSetImpl;
  // The array of a ragged set's slot.
  struct Allocation {
    ArrayInfo info;
    Mapping mapping;
    UniqueFd reader;  // O_RDONLY, for the mapping that takes the place of the writable one
  };
  [[nodiscard]] Result<void> take_allocation(Connection::Reply<wire::Created>& reply, const ArraySpec& spec);
  [[nodiscard]] Result<void> make_read_only();
  void let_go() noexcept;
  void spend() noexcept;

  std::shared_ptr<ResultSetImpl> set_;
  std::uint64_t index_;
  std::uint32_t attempt_;
  bool is_spent_ = true;              // or not held yet
  std::shared_ptr<Mapping> mapping_;  // of a dense set
  std::optional<Allocation> allocation_;
  std::vector<std::byte> value_;
  std::uint64_t generation_ = fork_generation();
};

}  // namespace cowmgr::detail
