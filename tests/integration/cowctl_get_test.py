#!/usr/bin/env python3
"""What `cowctl get` writes, against numpy.save and a real daemon. Usage: cowctl_get_test.py BIN_DIR"""

import io
import os
import stat
import subprocess
import sys
import unittest
from pathlib import Path

import cowctl_test
import numpy as np
from cowctl_test import CowctlTest, example_arrays


def saved(array):
    """The bytes that numpy.save writes."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shapes_and_orders():
    values = np.arange(24.0)
    for shape in ((), (1,), (24,), (24, 1), (1, 24), (1, 1), (4, 6), (2, 3, 4), (2, 1, 12), (1, 24, 1), (0,), (0, 3), (3, 0),
                  (10**12, 0)):
        for order in "CF":
            count = int(np.prod(shape, dtype=np.int64))
            yield f"{shape} {order}", np.array(values[:count].reshape(shape), order=order)


def field_names():
    for name in ("it's", 'a"b', """a'b"c""", "back\\slash", "tab\t", "line\n", "größe", "\x80", "\xa0", "\xad", "żółw", "\u200b", "\u2028", "\u3000",
                 "\ue000", "日本語", "🙂", "\U000e0001"):
        yield f"field {name!a}", np.zeros(3, dtype=[(name, "<f4"), ("other", "|u1")])
    yield "title", np.zeros(3, dtype=[(("it's a title", "x"), "<f4")])


def lengths_of_headers():
    """Every one that there is between two multiples of what NumPy aligns to, and one that is as long as it may be."""
    for length in range(1, 66):
        yield f"length {length}", np.zeros(2, dtype=[("x" * length, "<i2")])
    yield "many fields", np.zeros(2, dtype=[(f"field{i}", "<f4") for i in range(150)])


def nothing_in_an_item():
    yield "V0", np.zeros((2, 3), dtype="V0")
    yield "S0 Fortran", np.zeros((2, 3), dtype=np.dtype([("a", "S0")]), order="F")


class AsNumpySavesIt(CowctlTest):
    def check(self, arrays):
        for name, array in arrays:
            with self.subTest(name):
                self.run_text("put", self.save("in", array), "--name", "x", "--replace")
                self.run_text("get", "x", "out.npy", "--force")
                self.assertEqual((self.folder / "out.npy").read_bytes(), saved(array))

    def test_every_type(self):
        self.check(example_arrays())

    def test_every_shape_and_order(self):
        self.check(shapes_and_orders())

    def test_names_of_fields(self):
        self.check(field_names())

    def test_every_length_of_a_header(self):
        self.check(lengths_of_headers())

    def test_items_without_bytes(self):
        self.check(nothing_in_an_item())

    def test_what_numpy_loaded_from_the_segment(self):
        """However the segment's own header puts it."""
        for name, array in shapes_and_orders():
            with self.subTest(name):
                self.run_text("put", self.save("in", array), "--name", "x", "--replace")
                self.run_text("get", "x", "out.npy", "--force")
                loaded = np.load("/dev/shm" + self.info("x")["segment"])
                self.assertEqual((self.folder / "out.npy").read_bytes(), saved(loaded))

    def test_an_empty_array_can_be_mapped(self):
        self.put("empty", np.zeros((0, 3)))
        self.run_text("get", "empty", "out.npy")
        self.assertEqual(np.load(self.folder / "out.npy", mmap_mode="r").shape, (0, 3))


if __name__ == "__main__":
    cowctl_test.BIN = Path(sys.argv.pop(1)).resolve()
    unittest.main()
