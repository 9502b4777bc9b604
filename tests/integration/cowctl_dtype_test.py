#!/usr/bin/env python3
"""Arrays whose dtype does not fit a header of one page, through `cowctl` and NumPy. Usage: cowctl_dtype_test.py BIN_DIR"""

import unittest

import numpy as np
from cowctl_fixture import CowctlTest


def many_fields(count, rows=3):
    array = np.zeros(rows, dtype=[(f"field_{i:04}", "<f4") for i in range(count)])
    for i, name in enumerate(array.dtype.names):
        array[name] = np.arange(rows) + i
    return array


class LongDtypes(CowctlTest):
    def test_two_pages_load_in_place(self):
        array = many_fields(200)
        self.put("x", array)
        segment = "/dev/shm" + self.info("x")["segment"]
        mapped = np.load(segment, mmap_mode="r")
        self.assertEqual(mapped.dtype, array.dtype)
        self.assertTrue(np.array_equal(mapped, array))
        self.assertEqual(mapped.offset, 8192)
        self.cowctl("get", "x", "y.npy")
        self.assertTrue(np.array_equal(np.load(self.folder / "y.npy"), array))

    def test_one_page_is_what_it_was(self):
        self.put("x", many_fields(20))
        self.assertEqual(np.load("/dev/shm" + self.info("x")["segment"], mmap_mode="r").offset, 4096)

    def test_three_pages_are_refused(self):
        self.save("x", many_fields(400))
        self.refuse("invalid_dtype", "put", "x.npy", says="two pages")


if __name__ == "__main__":
    unittest.main()
