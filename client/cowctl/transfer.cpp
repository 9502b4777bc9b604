// Whole arrays: between .npy files and the daemon's memory, `put` and `get`, and read through, `verify`.

#include <algorithm>
#include <chrono>
#include <filesystem>

#include <fmt/format.h>

#include "client/cowctl/commands.hpp"
#include "client/cowctl/npy_file.hpp"
#include "client/cowctl/output_file.hpp"
#include "proto/text.hpp"

namespace cowmgr::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kWriteBytes = std::size_t{8} << 20;  // between two updates of the progress bar

ProgressBar bar_for(std::string_view what, const std::string& name, std::uint64_t total_bytes,
                    const Options& options) {
  return {fmt::format("{} {}", what, name), total_bytes, ProgressBar::Unit::bytes, !options.json};
}

std::string name_of_file(const std::filesystem::path& file) {
  return (file.extension() == ".npy" ? file.stem() : file.filename()).native();
}

// The name that the array shall have. Errors: invalid_name.
Result<std::string> name_to_put(const Options& options) {
  const std::string name = options.has_name ? options.name : name_of_file(options.file);
  auto ok = check_name(name);
  if (ok) return name;
  if (!options.has_name) ok.error().message += "; give another with --name";
  return error_of(std::move(ok));
}

tl::unexpected<Error> refused_put(Error error) {
  if (error.code == Errc::already_exists) error.message += " (cowctl put --replace)";
  return tl::unexpected<Error>(std::move(error));
}

Result<Array> fill_and_seal(ArrayWriter& writer, NpyInput& input, const std::string& name,
                            const Options& options) {
  ProgressBar bar = bar_for("put", name, input.data_bytes(), options);
  auto filled = input.read(writer.bytes(), [&](std::uint64_t done) { bar.update(done); });
  if (!filled) return error_of(std::move(filled));
  bar.finish();
  return writer.seal();
}

Json transfer_json(const Array& array, const Options& options) {
  Json json;
  json["name"] = array.name();
  json["version"] = array.version();
  json["file"] = options.file;
  add_spec(json, array.spec());
  json["bytes"] = array.bytes().size();
  return json;
}

// "train", version 1: <f4 (60000, 784), 188 MiB in 0.21 s
std::string transfer_text(const Array& array, Clock::duration elapsed) {
  return fmt::format("{}, version {}: {} {}, {} in {:.2f} s", printable(array.name()), array.version(),
                     visible(array.dtype().str()), to_string(array.shape()),
                     format_size(array.bytes().size()), std::chrono::duration<double>(elapsed).count());
}

Result<void> write_npy(OutputFile& file, const Array& array, const Options& options) {
  const std::string header = make_numpy_header(array.spec());
  if (auto ok = file.write(std::as_bytes(std::span(header))); !ok) return ok;
  const auto bytes = array.bytes();
  ProgressBar bar = bar_for("get", array.name(), bytes.size(), options);
  for (std::size_t done = 0; done < bytes.size();) {
    const auto chunk = bytes.subspan(done, std::min(kWriteBytes, bytes.size() - done));
    if (auto ok = file.write(chunk); !ok) return ok;
    done += chunk.size();
    bar.update(done);
  }
  if (auto ok = file.commit(); !ok) return ok;
  bar.finish();
  return {};
}

}  // namespace

Result<Report> run_put(const Options& options) {
  const auto start = Clock::now();
  auto input = options.file == kStandardStream ? NpyInput::standard_input() : NpyInput::open(options.file);
  if (!input) return error_of(std::move(input));
  const auto name = name_to_put(options);
  if (!name) return error_of(name);
  const auto client = Client::connect(options.daemon);
  if (!client) return error_of(client);
  auto writer = client->create(*name, input->spec(), options.create);
  if (!writer) return refused_put(std::move(writer).error());
  // The view keeps the array from being evicted before it is pinned.
  const auto array = fill_and_seal(*writer, *input, *name, options);
  if (!array) return refused_put(array.error());
  if (options.pin) {
    const auto pinned = client->pin(std::vector{*name});
    if (!pinned)
      return fail(pinned.error().code, fmt::format("put, but not pinned: {}", pinned.error().message));
  }
  Json json = transfer_json(*array, options);
  json["pinned"] = options.pin;
  return Report{transfer_text(*array, Clock::now() - start) + '\n', json};
}

Result<Report> run_get(const Options& options) {
  const auto start = Clock::now();
  const auto client = Client::connect(options.daemon);
  if (!client) return error_of(client);
  const auto array = client->attach(options.name);
  if (!array) return error_of(array);
  const bool is_stream = options.file == kStandardStream;
  auto file = is_stream ? OutputFile::standard_output() : OutputFile::create(options.file, options.force);
  if (!file) return error_of(std::move(file));
  if (auto written = write_npy(*file, *array, options); !written) return error_of(std::move(written));
  if (is_stream) return Report{};  // nothing else goes there
  return Report{
      fmt::format("{} to {}\n", transfer_text(*array, Clock::now() - start), printable(options.file)),
      transfer_json(*array, options)};
}

namespace {

// How an array with a checksum is found: "good", "corrupted", or "tampered" when the daemon serves it no
// more. Empty when it is gone by now, or not sealed.
Result<std::string> verify(const Client& client, const ArrayInfo& info, const Options& options) {
  if (info.state == ArrayState::tampered) return "tampered";
  if (info.state != ArrayState::sealed && info.state != ArrayState::unlinked) return "";
  const auto array = client.attach_id(info.id);
  if (!array && array.error().code == Errc::not_found) return "";
  if (!array && array.error().code == Errc::tampered) return "tampered";
  if (!array) return error_of(array);
  ProgressBar bar = bar_for("verify", info.name, info.data_bytes, options);
  const auto verified = array->verify([&](std::uint64_t done) { bar.update(done); });
  bar.finish();
  return verified ? "good" : "corrupted";
}

Json verified_json(const ArrayInfo& info, const std::string& result) {
  Json json;
  json["id"] = info.id;
  json["name"] = info.name;
  json["version"] = info.version;
  json["bytes"] = info.data_bytes;
  json["checksum"] = checksum_text(info.checksum);
  json["result"] = result;
  return json;
}

}  // namespace

Result<Report> run_verify(const Options& options) {
  const auto client = Client::connect(options.daemon);
  if (!client) return error_of(client);
  const auto arrays = listed(*client, options);
  if (arrays && arrays->empty() && !options.names.empty())
    return nothing_listed(options, *client, "array", "");
  if (!arrays) return error_of(arrays);
  Report report{.text = "", .json = Json::array()};
  std::vector<Row> rows;
  std::size_t bad = 0;
  std::size_t without = 0;
  for (const auto& info : *arrays) {
    if (info.checksum == 0 && info.state != ArrayState::writing) ++without;
    if (info.checksum == 0) continue;
    const auto result = verify(*client, info, options);
    if (!result) return error_of(result);
    if (result->empty()) continue;
    const bool is_good = *result == "good";
    if (!is_good) ++bad;
    rows.push_back({{info.name, std::to_string(info.version), format_size(info.data_bytes), *result},
                    bold_if(!is_good)});
    report.json.push_back(verified_json(info, *result));
  }
  report.is_bad_news = bad > 0;
  if (report.json.empty())
    report.note = "no arrays with a checksum; take one with `cowctl put --checksum`\n";
  else
    report.text = table({"NAME", ">VERSION", ">SIZE", "RESULT"}, std::move(rows), options.style);
  if (without > 0) report.note += fmt::format("{} without a checksum, not read\n", without);
  if (bad > 0) report.note += fmt::format("{} not as when it was sealed: put it again\n", bad);
  return report;
}

}  // namespace cowmgr::cli
