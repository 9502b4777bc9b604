#include "proto/glob.hpp"

#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/unit/result.hpp"

namespace cowmgr {
namespace {

bool matches(std::string_view pattern, std::string_view name) {
  std::uint64_t steps = 0;
  return Glob::parse(pattern)->matches(name, steps);
}

std::uint64_t steps_of(std::string_view pattern, std::string_view name) {
  std::uint64_t steps = 0;
  (void)Glob::parse(pattern)->matches(name, steps);
  return steps;
}

// The definition, without any wit: what ASCII patterns without backslashes match.
bool matches_by_definition(std::string_view pattern, std::string_view name) {
  if (pattern.empty()) return name.empty();
  if (pattern.front() == '*') {
    return matches_by_definition(pattern.substr(1), name) ||
           (!name.empty() && matches_by_definition(pattern, name.substr(1)));
  }
  const bool fits = !name.empty() && (pattern.front() == '?' || pattern.front() == name.front());
  return fits && matches_by_definition(pattern.substr(1), name.substr(1));
}

TEST(Glob, StarsAndQuestionMarks) {
  for (const std::string pattern :
       {"train", "t*", "*n", "*", "**", "t?ain", "?????", "t*a*n", "*train*", "?*", "*?"})
    EXPECT_TRUE(matches(pattern, "train")) << pattern;
  for (const std::string pattern :
       {"", "trai", "trains", "t", "*t", "n*", "??????", "????", "t*x*n", "?", "T*"})
    EXPECT_FALSE(matches(pattern, "train")) << pattern;
  EXPECT_TRUE(matches("*", ""));
  EXPECT_TRUE(matches("", ""));
  EXPECT_FALSE(matches("?", ""));
  EXPECT_TRUE(matches("a*b", "a/b")) << "a slash is a character like others";
  EXPECT_TRUE(matches("*", ".hidden")) << "and so is a dot";
}

TEST(Glob, BracketsStandForThemselves) {
  EXPECT_TRUE(matches("w[0]", "w[0]"));
  EXPECT_FALSE(matches("w[0]", "w0"));
  EXPECT_TRUE(matches("w[*", "w[0]"));
  EXPECT_FALSE(matches("[a-z]*", "abc"));
}

TEST(Glob, ABackslashTakesTheMeaningAway) {
  EXPECT_TRUE(matches(R"(a\*)", "a*"));
  EXPECT_FALSE(matches(R"(a\*)", "ab"));
  EXPECT_TRUE(matches(R"(a\?\\)", R"(a?\)"));
  EXPECT_TRUE(matches(R"(\a)", "a"));
  EXPECT_TRUE(matches(R"(a\)", R"(a\)")) << "where nothing follows it stands for itself";
}

TEST(Glob, AQuestionMarkIsOneCharacterOfUtf8) {
  for (const std::string one : {"a", "\xC3\xA9", "\xE6\x97\xA5", "\xF0\x9F\x90\x84"}) {
    EXPECT_TRUE(matches("?", one)) << one;
    EXPECT_TRUE(matches("*?", one)) << one;
    EXPECT_FALSE(matches("??", one)) << one;
    EXPECT_FALSE(matches("*??", one)) << one;
    EXPECT_TRUE(matches("?" + one + "*", one + one)) << one;
  }
}

TEST(Glob, ALiteralPatternMatchesItsNameAlone) {
  for (const std::string name : {"a", "*", "a?b", "w[0]", R"(a\b)", R"(\*)", "\xC3\xA9"}) {
    EXPECT_TRUE(matches(literal_pattern(name), name)) << name;
    EXPECT_FALSE(matches(literal_pattern(name), name + "x")) << name;
    EXPECT_FALSE(matches(literal_pattern(name), "x")) << name;
  }
}

TEST(Glob, AgreesWithTheDefinition) {
  std::mt19937 random(7);  // NOLINT(cert-msc32-c,cert-msc51-cpp): the same cases each time
  const auto text = [&](std::string_view letters, std::size_t most) {
    std::string out;
    for (std::size_t size = random() % (most + 1); out.size() < size;)
      out += letters[random() % letters.size()];
    return out;
  };
  for (int i = 0; i < 200'000; ++i) {
    const std::string pattern = text("ab*?", 7);
    const std::string name = text("ab", 9);
    ASSERT_EQ(matches(pattern, name), matches_by_definition(pattern, name)) << pattern << " and " << name;
  }
}

TEST(Glob, TakesFewStepsForAnyPattern) {
  const std::string name(255, 'a');
  EXPECT_LE(steps_of("*", name), 4U);
  EXPECT_LE(steps_of(std::string(512, '*'), name), 4U);
  EXPECT_LE(steps_of(std::string(512, '?'), name), 4U) << "the name is too short";
  std::string stars;
  while (stars.size() + 2 <= kMaxGlobBytes) stars += "*a";
  for (const std::string& pattern : {stars, stars.substr(0, 254) + "*b", "*" + std::string(127, 'a') + "b",
                                     "*" + std::string(127, 'a') + "?b*", std::string(254, 'a') + "b",
                                     "*?" + std::string(100, 'a') + "*?" + std::string(100, 'a') + "b"})
    EXPECT_LE(steps_of(pattern, name), 20'000U) << pattern;
}

TEST(Glob, HasABound) {
  EXPECT_THAT(Glob::parse(std::string(kMaxGlobBytes, '*')), Succeeds());
  EXPECT_THAT(Glob::parse(std::string(kMaxGlobBytes + 1, '*')), FailsWith(Errc::invalid_argument));
}

}  // namespace
}  // namespace cowmgr
