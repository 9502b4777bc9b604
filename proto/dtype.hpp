// The types of arrays are public; making one of a parsed .npy header takes the literal besides.
#pragma once

#include "cowmgr/dtype.hpp"      // IWYU pragma: export
#include "proto/errors.hpp"      // IWYU pragma: export
#include "proto/py_literal.hpp"  // IWYU pragma: export
