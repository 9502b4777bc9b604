// Asking again.
#pragma once

#include <string>

#include "proto/errors.hpp"

namespace cowmgr::test {

// What two daemons in a row had read when they died is not sent to a third: whoever asked asks again, and
// finds that it may be done. `was_asked_again`, if given, tells of that.
template <class Ask>
auto insist(const Ask& ask, bool* was_asked_again = nullptr) -> decltype(ask()) {
  for (;;) {
    auto answer = ask();
    if (answer || answer.error().code != Errc::disconnected ||
        answer.error().message.find("a third time") == std::string::npos)
      return answer;
    if (was_asked_again != nullptr) *was_asked_again = true;
  }
}

}  // namespace cowmgr::test
