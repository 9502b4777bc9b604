#include "cowmgr/client.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

#include "client/client_access.hpp"
#include "client/connection.hpp"
#include "client/handles.hpp"
#include "proto/glob.hpp"
#include "proto/text.hpp"

namespace cowmgr {
namespace {

using detail::Builder;
using detail::Offset;

constexpr const char* kSystemSocket = "/run/cowmgr/cowmgr.sock";

// DESIGN of the search: the environment, the user's own daemon, the system's.
std::string find_socket() {
  if (const char* path = std::getenv("COWMGR_SOCKET"); path != nullptr && *path != '\0') return path;
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR"); runtime != nullptr && *runtime != '\0') {
    std::string path = std::string(runtime) + "/cowmgr/cowmgr.sock";
    std::error_code ignored;
    if (std::filesystem::exists(path, ignored)) return path;
  }
  return kSystemSocket;
}

std::string find_daemon_user() {
  const char* user = std::getenv("COWMGR_DAEMON_USER");
  return user != nullptr ? user : "";
}

// Refuses here what the daemon would refuse: strings with NUL do not survive every step.
Result<void> check(std::string_view name, const ArraySpec& spec) {
  if (auto ok = check_name(name); !ok) return ok;
  if (auto bytes = data_bytes(spec); !bytes) return error_of(std::move(bytes));
  return {};
}

std::vector<std::string> strings_of(std::initializer_list<std::string_view> texts) {
  return {texts.begin(), texts.end()};
}

Result<EvictReport> report_of(const detail::Connection::Reply<wire::Names>& reply) {
  return EvictReport{detail::strings_of(reply->names()), reply->freed_bytes(),
                     detail::strings_of(reply->pinned())};
}

Result<ArrayDetails> details_of(const detail::Connection::Reply<wire::ArrayDetails>& reply) {
  if (reply->array() == nullptr)
    return fail(Errc::protocol_error, "the daemon's description of an array is malformed");
  auto info = detail::info_of(*reply->array());
  if (!info) return error_of(std::move(info));
  ArrayDetails details{*std::move(info), reply->resident_bytes(), reply->huge_bytes(), {}};
  if (reply->holders() != nullptr) {
    for (const auto* holder : *reply->holders()) details.holders.push_back(detail::info_of(*holder));
  }
  return details;
}

// Names, or patterns. A daemon that knows patterns alone gets the names as such.
struct WireTexts {
  Offset<flatbuffers::Vector<Offset<flatbuffers::String>>> patterns;
  Offset<flatbuffers::Vector<Offset<flatbuffers::String>>> names{};
};

WireTexts pack_texts(Builder& builder, std::span<const std::string> texts, bool are_patterns) {
  if (are_patterns) return {builder.CreateVectorOfStrings(texts.begin(), texts.end())};
  std::vector<std::string> patterns;
  for (const auto& text : texts) patterns.push_back(literal_pattern(text));
  return {builder.CreateVectorOfStrings(patterns), builder.CreateVectorOfStrings(texts.begin(), texts.end())};
}

// The same of a listing, where an empty pattern matches all.
struct WireText {
  Offset<flatbuffers::String> pattern;
  Offset<flatbuffers::String> name{};
};

WireText pack_text(Builder& builder, std::string_view text, bool is_pattern) {
  if (is_pattern) return {builder.CreateString(text.data(), text.size())};
  return {builder.CreateString(literal_pattern(text)), builder.CreateString(text.data(), text.size())};
}

std::int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// All pages of a listing: `build(builder, after)` asks for one, `append(page)` takes its items.
template <class Page, class Build, class Append>
Result<void> all_pages(detail::Connection& connection, const Build& build, const Append& append) {
  for (std::uint64_t after = 0;;) {
    const auto next = connection.call<Page>([&](Builder& b) { return build(b, after); },
                                            [&](auto& page) -> Result<std::uint64_t> {
                                              if (auto ok = append(*page); !ok)
                                                return error_of(std::move(ok));
                                              return page->next();
                                            });
    if (!next) return error_of(next);
    after = *next;
    if (after == 0) return {};
  }
}

}  // namespace

namespace detail {

const std::string& ClientAccess::daemon_user(const Client& client) noexcept {
  return client.connection_->daemon_user();
}

bool ClientAccess::was_robbed(const Client& client) noexcept {
  return client.connection_->was_robbed();
}

}  // namespace detail

Result<Client> Client::connect(const ConnectOptions& options) {
  auto connection = detail::Connection::open(
      {.socket = options.socket.empty() ? find_socket() : options.socket,
       .command = options.command.empty() ? program_invocation_short_name : options.command,
       .daemon_user = options.daemon_user.empty() ? find_daemon_user() : options.daemon_user,
       .reconnect = options.reconnect,
       .wait = options.wait,
       .answer = options.answer});
  if (!connection) return error_of(std::move(connection));
  return Client(*std::move(connection));
}

const std::string& Client::socket() const noexcept {
  return connection_->socket();
}

Result<ArrayWriter> Client::create(NameRef name, const ArraySpec& spec, const CreateOptions& options) const {
  if (auto ok = check(name, spec); !ok) return error_of(std::move(ok));
  const detail::WritingRequest request{std::string(name), spec, options};
  auto writer = connection_->call<wire::Created>(
      [&](Builder& b) { return pack(b, request); },
      [&](auto& reply) { return detail::WriterImpl::take(connection_, reply, request); });
  if (!writer) return error_of(std::move(writer));
  connection_->watch_daemon();
  return ArrayWriter(*std::move(writer));
}

Result<Array> Client::put(NameRef name, const ArraySpec& spec, std::span<const std::byte> data,
                          const CreateOptions& options) const {
  const auto expected = data_bytes(spec);
  if (!expected) return error_of(expected);
  if (*expected != data.size()) {
    return fail(Errc::invalid_shape,
                fmt::format("{} items of {} take {} bytes; {} were given", to_string(spec.shape),
                            spec.dtype.str(), *expected, data.size()));
  }
  auto writer = create(name, spec, options);
  if (!writer) return error_of(std::move(writer));
  if (!data.empty()) std::memcpy(writer->bytes().data(), data.data(), data.size());
  return writer->seal();
}

Result<Array> Client::attach(NameRef name, const AttachOptions& options) const {
  const std::string names[] = {std::string(name)};
  auto arrays = attach(names, options);
  if (!arrays) return error_of(std::move(arrays));
  return std::move(arrays->front());
}

Result<std::vector<Array>> Client::attach(std::span<const std::string> names,
                                          const AttachOptions& options) const {
  auto patience = connection_->patience(options.wait);
  for (;;) {
    patience.next();
    auto impls = connection_->call<wire::Arrays>(
        patience,
        [&](Builder& b) {
          const auto packed = b.CreateVectorOfStrings(names.begin(), names.end());
          return wire::CreateAttach(b, packed, 0, patience.wait_ms());
        },
        [&](auto& reply) {
          return detail::ArrayImpl::take_all(connection_, reply, names.size(), options.view);
        });
    if (!impls && patience.may_ask_again(impls.error())) continue;
    if (!impls) return tl::unexpected(patience.last_word(impls.error()));
    std::vector<Array> arrays;
    for (auto& impl : *impls) arrays.push_back(Array(std::move(impl)));
    return arrays;
  }
}

Result<std::vector<Array>> Client::attach(std::initializer_list<std::string_view> names,
                                          const AttachOptions& options) const {
  return attach(strings_of(names), options);
}

Result<Array> Client::attach_id(std::uint64_t id, View view) const {
  const std::vector<std::uint64_t> ids = {id};
  auto arrays = detail::ArrayImpl::attach(connection_, ids, view);
  if (!arrays) return error_of(std::move(arrays));
  return Array(std::move(arrays->front()));
}

Result<EvictReport> Client::evict(std::span<const std::string> names) const {
  return evict(names, false);
}

Result<EvictReport> Client::evict_matching(std::span<const std::string> patterns) const {
  return evict(patterns, true);
}

Result<EvictReport> Client::evict_matching(std::initializer_list<std::string_view> patterns) const {
  return evict_matching(strings_of(patterns));
}

Result<EvictReport> Client::evict_matching(NameRef pattern) const {
  return evict_matching({std::string_view(pattern)});
}

Result<EvictReport> Client::evict(std::span<const std::string> texts, bool are_patterns) const {
  const std::int64_t asked_us = now_us();
  return connection_->call<wire::Names>(
      [&](Builder& b) {
        const auto packed = pack_texts(b, texts, are_patterns);
        return wire::CreateEvict(b, packed.patterns, 0, asked_us, packed.names, are_patterns);
      },
      report_of);
}

Result<EvictReport> Client::evict(std::initializer_list<std::string_view> names) const {
  return evict(strings_of(names));
}

Result<EvictReport> Client::evict(NameRef name) const {
  return evict({std::string_view(name)});
}

Result<EvictReport> Client::evict_lru(std::uint64_t size_bytes) const {
  if (size_bytes == 0) return EvictReport{};
  return connection_->call<wire::Names>([&](Builder& b) { return wire::CreateEvict(b, 0, size_bytes); },
                                        report_of);
}

Result<std::vector<std::string>> Client::pin(std::span<const std::string> names, bool pinned) const {
  return pin(names, false, pinned);
}

Result<std::vector<std::string>> Client::pin_matching(std::span<const std::string> patterns,
                                                      bool pinned) const {
  return pin(patterns, true, pinned);
}

Result<std::vector<std::string>> Client::pin_matching(std::initializer_list<std::string_view> patterns,
                                                      bool pinned) const {
  return pin_matching(strings_of(patterns), pinned);
}

Result<std::vector<std::string>> Client::pin_matching(NameRef pattern, bool pinned) const {
  return pin_matching({std::string_view(pattern)}, pinned);
}

Result<std::vector<std::string>> Client::pin(std::span<const std::string> texts, bool are_patterns,
                                             bool pinned) const {
  return connection_->call<wire::Names>(
      [&](Builder& b) {
        const auto packed = pack_texts(b, texts, are_patterns);
        return wire::CreatePin(b, packed.patterns, pinned, packed.names, are_patterns);
      },
      [](auto& reply) { return Result<std::vector<std::string>>(detail::strings_of(reply->names())); });
}

Result<std::vector<std::string>> Client::pin(std::initializer_list<std::string_view> names,
                                             bool pinned) const {
  return pin(strings_of(names), pinned);
}

Result<std::vector<std::string>> Client::pin(NameRef name, bool pinned) const {
  return pin({std::string_view(name)}, pinned);
}

Result<ArrayDetails> Client::stat(NameRef name) const {
  return connection_->call<wire::ArrayDetails>(
      [&](Builder& b) { return wire::CreateStatArray(b, b.CreateString(name.data(), name.size())); },
      details_of);
}

Result<std::vector<ArrayInfo>> Client::list() const {
  return list("*", true);
}

Result<std::vector<ArrayInfo>> Client::list(NameRef name) const {
  return list(name, false);
}

Result<std::vector<ArrayInfo>> Client::list_matching(NameRef pattern) const {
  return list(pattern, true);
}

Result<std::vector<ArrayInfo>> Client::list(std::string_view text, bool is_pattern) const {
  std::vector<ArrayInfo> arrays;
  const auto ask = [&](Builder& b, std::uint64_t after) {
    const auto packed = pack_text(b, text, is_pattern);
    return wire::CreateListArrays(b, packed.pattern, after, 0, packed.name);
  };
  auto ok = all_pages<wire::Arrays>(*connection_, ask, [&](const wire::Arrays& page) -> Result<void> {
    if (page.arrays() == nullptr) return {};
    for (const auto* table : *page.arrays()) {
      auto info = detail::info_of(*table);
      if (!info) return error_of(std::move(info));
      arrays.push_back(*std::move(info));
    }
    return {};
  });
  if (!ok) return error_of(std::move(ok));
  std::ranges::stable_sort(arrays, {}, &ArrayInfo::created);  // each daemon has ids of its own to begin with
  return arrays;
}

Result<std::vector<ClientInfo>> Client::clients() const {
  std::vector<ClientInfo> clients;
  const auto ask = [](Builder& b, std::uint64_t after) { return wire::CreateListClients(b, after); };
  auto ok = all_pages<wire::Clients>(*connection_, ask, [&](const wire::Clients& page) -> Result<void> {
    if (page.clients() == nullptr) return {};
    for (const auto* table : *page.clients()) clients.push_back(detail::info_of(*table));
    return {};
  });
  if (!ok) return error_of(std::move(ok));
  std::ranges::stable_sort(clients, {}, &ClientInfo::connected);
  return clients;
}

namespace {

std::uint32_t lease_ms(const ResultsOptions& options) {
  return static_cast<std::uint32_t>(std::clamp<std::int64_t>(options.lease.count(), 0, UINT32_MAX));
}

// What both kinds of sets take.
struct WireTerms {
  Offset<flatbuffers::String> queue;
  Offset<flatbuffers::Vector<std::uint8_t>> job;
};

WireTerms pack_terms(Builder& builder, const ResultsOptions& options) {
  return {
      builder.CreateString(options.queue),
      builder.CreateVector(reinterpret_cast<const std::uint8_t*>(options.job.data()), options.job.size())};
}

// Refuses here what would not fit a frame.
Result<void> check(const ResultsOptions& options) {
  if (options.job.size() <= kMaxJobBytes) return {};
  return fail(Errc::invalid_argument, fmt::format("a job has at most {} bytes, not {}; put an array for more",
                                                  kMaxJobBytes, options.job.size()));
}

}  // namespace

template <class Build>
Result<ResultSet> Client::make_set(const Build& build) const {
  auto set = connection_->call<wire::Results>(
      build, [&](auto& reply) { return detail::ResultSetImpl::take(connection_, reply); });
  if (!set) return error_of(std::move(set));
  connection_->watch_daemon();
  return ResultSet(*std::move(set));
}

Result<ResultSet> Client::create_results(NameRef name, const ArraySpec& spec, std::uint64_t slots,
                                         const ResultsOptions& options) const {
  if (auto ok = check(name, spec); !ok) return error_of(std::move(ok));
  if (auto ok = check(options); !ok) return error_of(std::move(ok));
  if (spec.order != Order::c)
    return fail(Errc::invalid_argument, "a result set has C order, so that the rows of a slot lie together");
  const std::uint64_t token = connection_->next_token();
  return make_set([&](Builder& b) {
    const auto packed = detail::pack_spec(b, name, spec);
    const auto terms = pack_terms(b, options);
    return wire::CreateMakeResults(b, packed.name, packed.dtype, packed.shape, slots, options.replace,
                                   options.evictable, options.mode, false, options.attempts,
                                   lease_ms(options), options.is_detached, terms.queue, terms.job, token);
  });
}

Result<ResultSet> Client::create_ragged(NameRef name, std::uint64_t slots,
                                        const ResultsOptions& options) const {
  if (auto ok = check_name(name); !ok) return error_of(std::move(ok));
  if (auto ok = check(options); !ok) return error_of(std::move(ok));
  const std::uint64_t token = connection_->next_token();
  return make_set([&](Builder& b) {
    const auto text = b.CreateString(name.data(), name.size());
    const auto terms = pack_terms(b, options);
    return wire::CreateMakeResults(b, text, 0, 0, slots, options.replace, false, options.mode, true,
                                   options.attempts, lease_ms(options), options.is_detached, terms.queue,
                                   terms.job, token);
  });
}

namespace {

// Asks again until the wait is over: one request waits only so long.
template <class Build>
Result<std::shared_ptr<detail::ResultSetImpl>> open_set(const std::shared_ptr<detail::Connection>& connection,
                                                        Milliseconds wait, const Build& build) {
  auto patience = connection->patience(wait);
  for (;;) {
    patience.next();
    auto set = connection->call<wire::Results>(
        patience, [&](Builder& b) { return build(b, patience.wait_ms()); },
        [&](auto& reply) { return detail::ResultSetImpl::take(connection, reply); });
    if (set) return set;
    if (!patience.may_ask_again(set.error())) return tl::unexpected(patience.last_word(set.error()));
  }
}

}  // namespace

Result<ResultSet> Client::open_results(NameRef name, Milliseconds wait) const {
  auto set = open_set(connection_, wait, [&](Builder& b, std::uint32_t wait_ms) {
    return wire::CreateOpenResults(b, b.CreateString(name.data(), name.size()), wait_ms);
  });
  if (!set) return error_of(std::move(set));
  return ResultSet(*std::move(set));
}

Result<ResultSet> Client::open_queued(NameRef queue, Milliseconds wait) const {
  auto set = open_set(connection_, wait, [&](Builder& b, std::uint32_t wait_ms) {
    return wire::CreateOpenResults(b, 0, wait_ms, b.CreateString(queue.data(), queue.size()));
  });
  if (!set) return error_of(std::move(set));
  return ResultSet(*std::move(set));
}

Result<std::vector<ResultsInfo>> Client::list_results() const {
  return list_results("*", true);
}

Result<std::vector<ResultsInfo>> Client::list_results(NameRef name) const {
  return list_results(name, false);
}

Result<std::vector<ResultsInfo>> Client::list_results_matching(NameRef pattern) const {
  return list_results(pattern, true);
}

Result<std::vector<ResultsInfo>> Client::list_results(std::string_view text, bool is_pattern) const {
  std::vector<ResultsInfo> sets;
  const auto ask = [&](Builder& b, std::uint64_t after) {
    const auto packed = pack_text(b, text, is_pattern);
    return wire::CreateListResults(b, packed.pattern, after, 0, packed.name);
  };
  auto ok = all_pages<wire::Results>(*connection_, ask, [&](const wire::Results& page) -> Result<void> {
    if (page.sets() == nullptr) return {};
    for (const auto* table : *page.sets()) {
      auto info = detail::info_of(*table);
      if (!info) return error_of(std::move(info));
      sets.push_back(*std::move(info));
    }
    return {};
  });
  if (!ok) return error_of(std::move(ok));
  return sets;
}

Result<DaemonInfo> Client::ping() const {
  return connection_->call<wire::Pong>(
      [](Builder& b) { return wire::CreatePing(b); },
      [](auto& reply) { return Result<DaemonInfo>(detail::info_of(*reply)); });
}

Result<void> Client::shutdown(bool purge) const {
  return connection_->call_done([&](Builder& b) { return wire::CreateShutdown(b, purge); });
}

}  // namespace cowmgr
