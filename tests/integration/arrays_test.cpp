// Arrays go in, and come out as they were: every kind of type, shape and order; all or none; waiting.
#include <algorithm>
#include <array>
#include <chrono>
#include <complex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/support/child.hpp"
#include "tests/support/daemon_fixture.hpp"

namespace cowmgr::test {
namespace {

class Arrays : public DaemonTest {};

ArraySpec spec_of(const std::string& dtype, Shape shape, Order order = Order::c) {
  return {Dtype::parse(dtype).value(), std::move(shape), order};
}

// Creates, fills, seals; attaches from another session; the bytes must be the same.
void expect_round_trip(const Client& writer, const Client& reader, const std::string& name,
                       const ArraySpec& spec) {
  const auto data = pattern_bytes(data_bytes(spec).value());
  auto array = writer.create(name, spec);
  ASSERT_THAT(array, Succeeds()) << name;
  ASSERT_EQ(array->bytes().size(), data.size());
  EXPECT_EQ(std::count(array->bytes().begin(), array->bytes().end(), std::byte{0}),
            static_cast<std::ptrdiff_t>(data.size()))
      << "memory comes zeroed";
  std::copy(data.begin(), data.end(), array->bytes().begin());
  ASSERT_THAT(array->seal(), Succeeds());

  const auto view = reader.attach(name);
  ASSERT_THAT(view, Succeeds()) << name;
  EXPECT_EQ(view->spec(), spec);
  EXPECT_EQ(view->name(), name);
  EXPECT_EQ(view->version(), 1U);
  EXPECT_EQ(copy_of(view->bytes()), data);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view->bytes().data()) % 4096, 0U);
}

TEST_F(Arrays, OfEveryKindOfType) {
  const Client writer = connect();
  const Client reader = connect();
  for (const std::string dtype : {"|b1",
                                  "|i1",
                                  "|u1",
                                  "<i2",
                                  ">i2",
                                  "<u4",
                                  "<i8",
                                  ">u8",
                                  "<f2",
                                  "<f4",
                                  "<f8",
                                  ">f8",
                                  "<f16",
                                  "<c8",
                                  "<c16",
                                  "<M8[ns]",
                                  "<M8[D]",
                                  "<m8[us]",
                                  "|S12",
                                  "<U5",
                                  "|V16",
                                  "[('x', '<f4'), ('y', '<i2', (3,))]",
                                  "[('a', [('b', '|u1')]), ('c', '>f8')]"}) {
    expect_round_trip(writer, reader, "of " + dtype, spec_of(dtype, {7, 3}));
  }
}

// Two names are never taken for the two ends of one.
template <class T>
concept TakesTwoNamesForOne = requires(const T& client) {
  client.stat({"a", "b"});
} || requires(const T& client) {
  client.list({"a", "b"});
} || requires(const T& client) {
  client.open_results({"a", "b"});
} || requires(const T& client) {
  client.open_queued({"a", "b"});
} || requires(const T& client) {
  client.list_results({"a", "b"});
} || requires(const T& client) {
  client.create_ragged({"a", "b"}, 1);
} || requires(const T& client, const ArraySpec& spec) {
  client.create({"a", "b"}, spec);
} || requires(const T& client, const ArraySpec& spec) {
  client.create_results({"a", "b"}, spec, 1);
} || requires(const T& client, std::span<const int> items) {
  client.put({"a", "b"}, items, Shape{1});
};
static_assert(!TakesTwoNamesForOne<Client>);

TEST_F(Arrays, AreNamedOneByOneOrTogether) {
  const Client client = connect();
  for (const std::string name : {"a", "b", "c"}) {
    ASSERT_THAT(client.put(name, std::vector<int>{1, 2}, {2}), Succeeds());
  }
  const auto both = client.attach({"a", "b"});
  ASSERT_THAT(both, Succeeds());
  EXPECT_EQ((*both)[0].name() + (*both)[1].name(), "ab");
  EXPECT_THAT(client.attach({std::string("a"), std::string("b")}), Succeeds());
  EXPECT_EQ(client.attach(std::string_view("abc").substr(2))->name(), "c");
  EXPECT_THAT(*client.pin("a"), testing::ElementsAre("a"));
  EXPECT_THAT(*client.pin({"a", "b"}, false), testing::ElementsAre("a", "b"));
  EXPECT_THAT(client.evict("c")->names, testing::ElementsAre("c"));
  EXPECT_THAT(client.evict({"a", "b"})->names, testing::ElementsAre("a", "b"));
}

TEST_F(Arrays, AreMadeOfWhateverHoldsItemsInARow) {
  const Client client = connect();
  const std::vector<double> items = {1, 2, 3, 4};
  EXPECT_THAT(*client.put("vector", items, {2, 2})->as<double>(), testing::ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(*client.put("array", std::array{1, 2}, {2})->as<int>(), testing::ElementsAre(1, 2));
  EXPECT_THAT(*client.put("span", std::span(items).first(3), {3})->as<double>(), testing::SizeIs(3));
  EXPECT_THAT(*client.put<double>("named", items, {4}, {.checksum = true})->as<double>(), testing::SizeIs(4));
}

TEST_F(Arrays, OfEveryNumberOfDimensions) {
  const Client writer = connect();
  const Client reader = connect();
  for (std::size_t dimensions = 0; dimensions <= 32; ++dimensions) {
    Shape shape(dimensions, 1);
    for (std::size_t i = 0; i < std::min<std::size_t>(dimensions, 10); ++i) shape[dimensions - 1 - i] = 2;
    expect_round_trip(writer, reader, "c " + std::to_string(dimensions), spec_of("<i4", shape));
    expect_round_trip(writer, reader, "f " + std::to_string(dimensions),
                      spec_of("<i4", shape, Order::fortran));
  }
}

TEST_F(Arrays, WithoutItems) {
  const Client writer = connect();
  const Client reader = connect();
  for (const Shape& shape : {Shape{0}, Shape{0, 784}, Shape{5, 0, 3}}) {
    expect_round_trip(writer, reader, "empty " + to_string(shape), spec_of("<f4", shape));
  }
}

TEST_F(Arrays, OfManyPages) {
  const Client writer = connect();
  const Client reader = connect();
  for (const std::uint64_t size : {4095U, 4096U, 4097U, (2U << 20U) - 8192U, 2U << 20U, (5U << 20U) + 1U}) {
    expect_round_trip(writer, reader, std::to_string(size) + " bytes", spec_of("|u1", {size}));
  }
}

TEST_F(Arrays, AreReadAsTheirOwnTypeAlone) {
  const Client client = connect();
  const std::vector<float> values = {1.0F, 2.5F, -3.0F};
  auto array = client.put<float>("floats", values, {3});
  ASSERT_THAT(array, Succeeds());
  EXPECT_THAT(std::vector<float>(array->as<float>()->begin(), array->as<float>()->end()),
              testing::ElementsAreArray(values));
  EXPECT_THAT(array->as<double>(), FailsWith(Errc::invalid_dtype));
  EXPECT_THAT(array->as<std::complex<float>>(), FailsWith(Errc::invalid_dtype));
  EXPECT_THAT(array->mutable_as<float>(), FailsWith(Errc::permission_denied)) << "the view is shared";
}

TEST_F(Arrays, ThatCannotBeAreRefused) {
  const Client client = connect();
  EXPECT_THAT(client.create("", spec_of("|u1", {1})), FailsWith(Errc::invalid_name));
  EXPECT_THAT(client.create("a\nb", spec_of("|u1", {1})), FailsWith(Errc::invalid_name));
  EXPECT_THAT(client.create(std::string(256, 'n'), spec_of("|u1", {1})), FailsWith(Errc::invalid_name));
  EXPECT_THAT(client.create("dims", spec_of("|u1", Shape(33, 1))), FailsWith(Errc::invalid_shape));
  EXPECT_THAT(client.create("vast", spec_of("|u1", {1ULL << 40U, 1ULL << 40U})),
              FailsWith(Errc::invalid_shape));
  EXPECT_THAT(client.put("short", spec_of("<f4", {3}), pattern_bytes(11)), FailsWith(Errc::invalid_shape));
  EXPECT_THAT(client.list(), Succeeds());
  EXPECT_EQ(client.list()->size(), 0U) << "nothing of it stays";
}

TEST_F(Arrays, HaveOneNameEach) {
  const Client client = connect();
  const auto first = client.put("a", spec_of("|u1", {3}), pattern_bytes(3));
  ASSERT_THAT(first, Succeeds());
  EXPECT_THAT(client.put("a", spec_of("|u1", {3}), pattern_bytes(3)), FailsWith(Errc::already_exists));
  auto writer = client.create("b", spec_of("|u1", {3}));
  ASSERT_THAT(writer, Succeeds());
  EXPECT_THAT(client.create("b", spec_of("|u1", {3})), FailsWith(Errc::already_exists));
  EXPECT_THAT(client.attach("b"), FailsWith(Errc::not_found)) << "nobody sees what is not sealed";
}

TEST_F(Arrays, ThatAreNotSealedGoWithTheirWriter) {
  const Client client = connect();
  {
    auto writer = client.create("half", spec_of("|u1", {100'000}));
    ASSERT_THAT(writer, Succeeds());
    EXPECT_EQ(client.stat("half")->array.state, ArrayState::writing);
    EXPECT_EQ(client.stat("half")->array.writer_pid, ::getpid());
  }
  EXPECT_THAT(client.stat("half"), FailsWith(Errc::not_found));
  EXPECT_EQ(client.ping()->used_bytes, 0U);
}

// ---- Several at once ----

TEST_F(Arrays, AreAttachedAllOrNone) {
  const Client client = connect();
  std::vector<std::string> names;
  for (unsigned i = 0; i < 64; ++i) {
    names.push_back("part " + std::to_string(i));
    ASSERT_THAT(client.put(names.back(), spec_of("|u1", {5000}), pattern_bytes(5000, i)), Succeeds());
  }
  {
    const auto views = client.attach(names);
    ASSERT_THAT(views, Succeeds());
    ASSERT_EQ(views->size(), names.size());
    for (unsigned i = 0; i < views->size(); ++i) {
      EXPECT_EQ((*views)[i].name(), names[i]);
      EXPECT_EQ(copy_of((*views)[i].bytes()), pattern_bytes(5000, i));
    }
  }
  names[40] = "missing";
  const auto refused = client.attach(names);
  EXPECT_THAT(refused, FailsWith(Errc::not_found));
  EXPECT_THAT(refused.error().message, testing::HasSubstr("missing"));
  EXPECT_TRUE(eventually([&] { return client.ping()->viewed_bytes == 0; })) << "nor the views of before";

  names.resize(65, "part 1");
  EXPECT_THAT(client.attach(names), FailsWith(Errc::invalid_argument)) << "64 in one request at most";
  EXPECT_THAT(client.attach(std::vector<std::string>()), FailsWith(Errc::invalid_argument));
}

TEST_F(Arrays, MayBeAttachedTwiceInOneRequest) {
  const Client client = connect();
  const auto array = client.put("a", spec_of("|u1", {10}), pattern_bytes(10));
  const std::vector<std::string> names = {"a", "a"};
  const auto views = client.attach(names);
  ASSERT_THAT(views, Succeeds());
  EXPECT_EQ((*views)[0].bytes().data(), (*views)[1].bytes().data());
  EXPECT_EQ(client.stat("a")->array.views, 3U);
}

// ---- Waiting ----

TEST_F(Arrays, AreWaitedFor) {
  Child reader([&](const Link& test) {
    const Client client = connect();
    test.say("waiting");
    const std::vector<std::string> names = {"first", "second"};
    const auto views = client.attach(names, {.wait = kForever});
    ASSERT_THAT(views, Succeeds());
    EXPECT_EQ(copy_of((*views)[1].bytes()), pattern_bytes(100, 2));
  });
  reader.expect("waiting");
  const Client client = connect();
  ASSERT_THAT(client.put("first", spec_of("|u1", {100}), pattern_bytes(100, 1)), Succeeds());
  auto second = client.create("second", spec_of("|u1", {100}));
  ASSERT_THAT(client.list(), Succeeds());
  const auto data = pattern_bytes(100, 2);
  std::copy(data.begin(), data.end(), second->bytes().begin());
  ASSERT_THAT(second->seal(), Succeeds());
  EXPECT_EQ(reader.wait(), 0);
}

// Many times, so that the array comes now before, now during, now after the daemon's look.
TEST_F(Arrays, AreNotMissedByWhoWaits) {
  constexpr int kRounds = 300;
  Child reader([&](const Link& test) {
    const Client client = connect();
    for (int round = 0; round < kRounds; ++round) {
      ASSERT_THAT(client.attach("round " + std::to_string(round), {.wait = std::chrono::minutes(1)}),
                  Succeeds())
          << round;
      test.say("seen");
    }
  });
  const Client client = connect();
  for (int round = 0; round < kRounds; ++round) {
    ASSERT_THAT(client.put("round " + std::to_string(round), spec_of("|u1", {1}), pattern_bytes(1)),
                Succeeds());
    reader.expect("seen");
  }
  EXPECT_EQ(reader.wait(), 0);
}

TEST_F(Arrays, AreWaitedForAsLongAsWasAsked) {
  const Client client = connect();
  for (const int wait_ms : {1, 20, 150}) {
    const auto begin = std::chrono::steady_clock::now();
    const auto missing = client.attach("never", {.wait = Milliseconds(wait_ms)});
    EXPECT_THAT(missing, FailsWith(Errc::timed_out));
    EXPECT_GE(std::chrono::steady_clock::now() - begin, Milliseconds(wait_ms));
  }
  EXPECT_THAT(client.attach("never"), FailsWith(Errc::not_found)) << "no wait was asked for";
}

}  // namespace
}  // namespace cowmgr::test
