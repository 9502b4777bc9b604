#!/usr/bin/env python3
"""What `cowctl get` writes, against numpy.save and a real daemon. Usage: cowctl_get_test.py BIN_DIR"""

import glob
import io
import os
import resource
import stat
import subprocess
import unittest

import numpy as np
from cowctl_fixture import TIMEOUT_S, CowctlTest, example_arrays


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


class Get(CowctlTest):
    def setUp(self):
        super().setUp()
        self.array = np.arange(100_000, dtype="<i4")
        self.put("x", self.array)

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())

    def test_text_says_what_was_written(self):
        self.assertRegex(self.run_text("get", "x", "new.npy"),
                         r'\A"x", version 1: <i4 \(100000,\), 391 KiB in \d+\.\d\d s to "new.npy"\n\Z')
        answer = self.run_json("get", "x", "newer.npy")
        self.assertEqual((answer["name"], answer["file"], answer["bytes"]), ("x", "newer.npy", 400_000))

    def test_a_file_is_overwritten_only_by_force(self):
        (self.folder / "old.npy").write_text("precious")
        before = self.files()
        self.refuse("already_exists", "get", "x", "old.npy", says='"old.npy" exists; overwrite it with --force')
        self.assertEqual((self.folder / "old.npy").read_text(), "precious")
        self.run_text("get", "x", "old.npy", "--force")
        self.assert_same(np.load(self.folder / "old.npy"), self.array)
        self.assertEqual(self.files(), before)

    def test_a_new_file_has_the_usual_mode(self):
        self.run_text("get", "x", "new.npy", umask=0o027)
        self.assertEqual(stat.S_IMODE((self.folder / "new.npy").stat().st_mode), 0o640)

    def test_a_link_stays_a_link(self):
        (self.folder / "real.npy").write_text("old")
        (self.folder / "link.npy").symlink_to("real.npy")
        self.refuse("already_exists", "get", "x", "link.npy", says="--force")
        self.run_text("get", "x", "link.npy", "--force")
        self.assertTrue((self.folder / "link.npy").is_symlink())
        self.assert_same(np.load(self.folder / "real.npy"), self.array)

    def test_places_where_no_file_can_be(self):
        before = self.files()
        self.refuse("not_found", "get", "x", "missing/x.npy", says='"missing": No such file or directory')
        self.refuse("os_failure", "get", "x", "x.npy/x.npy", says="Not a directory")
        self.refuse("os_failure", "get", "x", "n" * 300, says="File name too long")
        self.refuse("invalid_argument", "get", "x", "", says="empty")
        for force in ([], ["--force"]):
            self.refuse("invalid_argument", "get", "x", self.folder, *force, says="is a directory")
        self.assertEqual(self.files(), before)

    def test_unknown_array(self):
        before = self.files()
        self.refuse("not_found", "get", "y", "y.npy", says='"y".*cowctl ls')
        self.assertEqual(self.files(), before)

    def test_a_full_device(self):
        self.refuse("already_exists", "get", "x", "/dev/full")
        self.refuse("os_failure", "get", "x", "/dev/full", "--force", says='write "/dev/full": No space left.*free')
        self.assertTrue(stat.S_ISCHR(os.stat("/dev/full").st_mode))
        self.assertEqual(glob.glob("/dev/.cowctl*"), [])

    def test_a_failure_in_the_middle_leaves_nothing(self):
        (self.folder / "old.npy").write_text("precious")
        before = self.files()

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

        self.refuse("os_failure", "get", "x", "new.npy", says="File too large", preexec_fn=limit)
        self.refuse("os_failure", "get", "x", "old.npy", "--force", says="File too large", preexec_fn=limit)
        self.assertEqual(self.files(), before)
        self.assertEqual((self.folder / "old.npy").read_text(), "precious")

    def test_evict_during_get(self):
        """A pipe holds get up, with its view; the name goes, the data stays."""
        os.mkfifo(self.folder / "pipe")
        process = self.start("get", "x", "pipe", "--force", stdout=subprocess.DEVNULL)
        with open(self.folder / "pipe", "rb") as pipe:  # opens when get does, which has attached before
            self.assertEqual(self.info("x")["views"], 1)
            self.assertIn("cowctl get", [client["command"] for client in self.run_json("clients")])
            holders = self.run_json("stat", "x")["holders"]
            self.assertEqual([holder["pid"] for holder in holders], [process.pid])
            self.assertEqual(self.run_json("evict", "x"), {"names": ["x"], "freed_bytes": 0})
            self.refuse("not_found", "get", "x", "again.npy")
            self.assertEqual(self.info("x")["state"], "draining")
            content = pipe.read()
        self.assertEqual(process.wait(TIMEOUT_S), 0)
        self.assertEqual(content, self.save("x", self.array).read_bytes())
        self.until(lambda: self.names() == [])


if __name__ == "__main__":
    unittest.main()
