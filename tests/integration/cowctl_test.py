#!/usr/bin/env python3
"""Transcripts of cowctl against a real daemon. Usage: cowctl_test.py BIN_DIR"""

import json
import os
import pty
import signal
import struct
import termios
import unicodedata
import unittest

import numpy as np
from cowctl_fixture import MIB, NOBODY, TIMEOUT_S, CowctlTest, example_arrays

LS_KEYS = {"name", "version", "dtype", "shape", "order", "bytes", "state", "protection", "views", "pinned", "owner",
           "segment", "created", "last_used", "id", "segment_bytes", "evictable", "mode"}
ISO_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"


class RoundTrip(CowctlTest):
    def test_every_type_comes_back_as_it_was(self):
        for name, array in example_arrays():
            with self.subTest(name):
                answer = self.put(name, array)
                self.assertEqual(answer["bytes"], array.nbytes)
                self.assertEqual(answer["shape"], list(array.shape))
                self.run_text("get", name, f"{name}-back.npy")
                path = self.folder / f"{name}-back.npy"
                self.assert_same(np.load(path), np.load(self.folder / f"{name}.npy"))
                self.assert_same(np.load(path), array)
        self.assertEqual(self.names(), [name for name, _ in example_arrays()])

    def test_segments_are_npy_files(self):
        for name, array in example_arrays():
            with self.subTest(name):
                self.put(name, array)
                info = self.info(name)
                path = "/dev/shm" + info["segment"]
                self.assertEqual(os.stat(path).st_size, info["segment_bytes"])
                self.assert_same(np.load(path), array)
                if array.size > 0:  # numpy maps nothing that is empty
                    mapped = np.load(path, mmap_mode="r")
                    self.assertEqual(mapped.offset, 4096)
                    self.assert_same(mapped, array)

    def test_a_segment_can_be_put_again(self):
        array = np.arange(1000.0)
        self.put("first", array)
        self.run_text("put", "/dev/shm" + self.info("first")["segment"], "--name", "second")
        self.run_text("get", "second", "second.npy")
        self.assert_same(np.load(self.folder / "second.npy"), array)

    def test_other_versions_of_the_format(self):
        array = np.arange(12, dtype="<i8").reshape(3, 4)
        for version in ((1, 0), (2, 0), (3, 0)):
            with open(self.folder / "v.npy", "wb") as file:
                np.lib.format.write_array(file, array, version=version)
            self.run_text("put", "v.npy", "--replace")
            self.run_text("get", "v", "back.npy", "--force")
            self.assert_same(np.load(self.folder / "back.npy"), array)

    def test_bytes_after_the_data_do_not_matter(self):
        path = self.save("tail", np.arange(10))
        with open(path, "ab") as file:
            file.write(b"more")
        self.run_text("put", path)
        self.assertEqual(self.info("tail")["bytes"], 80)


class Put(CowctlTest):
    def test_the_name_is_the_files_unless_given(self):
        path = self.save("train.v1", np.arange(3))
        self.assertEqual(self.run_json("put", path)["name"], "train.v1")
        self.assertEqual(self.run_json("put", path, "--name", "other")["name"], "other")
        self.assertEqual(self.names(), ["train.v1", "other"])

    def test_names_of_all_kinds(self):
        path = self.save("x", np.arange(3))
        names = ["a b", "größe", "日本語🙂", "[ab]", "[a,b]", "{}", "*", "a?b\\c", "-x", "--json", "x" * 255, ".", "a/b", "%%", '"']
        for name in names:
            self.run_text("put", path, f"--name={name}")
            self.run_text("get", "--force", "--", name, "back.npy")
        self.assertEqual(self.names(), names)
        self.assertEqual(self.run_text("ls").count("\n"), len(names) + 1)

    def test_text_says_what_was_put(self):
        text = self.run_text("put", self.save("train", np.zeros((60, 784), dtype="f4")))
        self.assertRegex(text, r'\A"train", version 1: <f4 \(60, 784\), 184 KiB in \d+\.\d\d s\n\Z')

    def test_a_name_is_replaced_only_on_request(self):
        self.put("x", np.arange(3))
        self.refuse("already_exists", "put", self.save("x", np.arange(4)), says="exists.*--replace")
        self.assertEqual(self.run_json("put", "x.npy", "--replace")["version"], 2)
        self.assertEqual(self.info("x")["shape"], [4])

    def test_flags_reach_the_daemon(self):
        self.put("plain", np.arange(3))
        self.put("marked", np.arange(3), "--evictable", "--mode", "0640", "--pin")
        plain, marked = self.info("plain"), self.info("marked")
        self.assertEqual((plain["evictable"], plain["mode"], plain["pinned"]), (False, "0600", False))
        self.assertEqual((marked["evictable"], marked["mode"], marked["pinned"]), (True, "0640", True))

    def test_pin_means_this_name_alone(self):
        self.put("ab", np.arange(3))
        self.run_text("put", "ab.npy", "--name", "a*", "--pin")
        self.assertFalse(self.info("ab")["pinned"])
        self.assertTrue(self.info("a*")["pinned"])

    def test_bad_names(self):
        self.save("x", np.arange(3))
        self.refuse("invalid_name", "put", "x.npy", "--name", "", says="empty")
        self.refuse("invalid_name", "put", "x.npy", "--name", "x" * 256, says="256 bytes; at most 255")
        self.refuse("invalid_name", "put", "x.npy", "--name", b"caf\xe9", says="not UTF-8")
        self.refuse("invalid_name", "put", "x.npy", "--name", b"\xed\xa0\x80", says="not UTF-8")
        for control in ("\n", "\t", "\x1b[31m", "\x01", "\x7f", "\u0085"):
            self.refuse("invalid_name", "put", "x.npy", "--name", f"a{control}b", says="control character U\\+")
        os.rename(self.folder / "x.npy", os.fsencode(self.folder) + b"/caf\xe9.npy")
        self.refuse("invalid_name", "put", b"caf\xe9.npy", says="give another with --name")
        self.assertEqual(self.names(), [])

    def test_bad_files(self):
        os.mkfifo(self.folder / "pipe.npy")
        self.refuse("not_found", "put", "missing.npy", says='open "missing.npy": No such file')
        self.refuse("not_found", "put", "", says="No such file")
        self.refuse("not_found", "put", "\x1b[2Jmissing.npy", says=r"\\x1b")
        self.refuse("invalid_file", "put", self.folder, says="not a regular file")
        self.refuse("invalid_file", "put", "pipe.npy", says="not a regular file")
        self.refuse("invalid_file", "put", "/dev/zero", says="not a regular file")
        self.refuse("os_failure", "put", "x" * 300, says="File name too long")

    @unittest.skipUnless(os.geteuid() == 0, "needs a second user")
    def test_a_file_that_may_not_be_read(self):
        self.save("x", np.arange(3)).chmod(0o600)
        self.refuse("permission_denied", "put", "x.npy", says="Permission denied", user=NOBODY)

    def test_truncated_files(self):
        whole = self.save("x", np.arange(1000)).read_bytes()
        for length, says in ((0, "magic"), (3, "magic"), (6, "ends within"), (9, "ends within"), (60, "ends within its header"),
                             (128, "8000 bytes of data, 0 are there"), (len(whole) - 1, "8000 bytes of data, 7999 are")):
            (self.folder / "x.npy").write_bytes(whole[:length])
            self.refuse("invalid_file", "put", "x.npy", says=says)
        self.assertEqual(self.daemon.segments(), [])

    def test_hostile_headers(self):
        def header(descr="'<f8'", fortran="False", shape="(3,)", more=""):
            return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, {more}}}".encode()

        cases = [
            ("invalid_file", "magic", b"\x89PNG\r\n\x1a\n" + bytes(100)),
            ("invalid_file", "version 9", npy(header(), version=9)),
            ("invalid_file", "claims 4294967307 bytes", npy(header(), version=2, length=0xFFFFFFFF)),
            ("invalid_file", "ends within its header", npy(header(), version=1, length=0xFF00)),
            ("invalid_file", ".", npy(b"")),
            ("invalid_file", ".", npy(b"\xff" * 50)),
            ("invalid_file", ".", npy(b"(" * 60000)),
            ("invalid_file", ".", npy(b"__import__('os').system('true')")),
            ("invalid_file", "dict", npy(b"[1, 2, 3]")),
            ("invalid_file", "dict", npy(header(more="'more': 1"))),
            ("invalid_file", ".", npy(header(shape="(-1,)"))),
            ("invalid_file", ".", npy(header(shape="(3.5,)"))),
            ("invalid_file", "tuple", npy(header(shape="3"))),
            ("invalid_file", ".", npy(header(shape=f"({1 << 70},)"))),
            ("invalid_file", "bool", npy(header(fortran="1"))),
            ("invalid_file", "truncated", npy(header(shape=f"({1 << 40},)"))),
            ("invalid_shape", "larger than memory", npy(header(shape=f"({1 << 40}, {1 << 40})"))),
            ("invalid_shape", "larger than memory", npy(header(shape=f"(0, {1 << 62}, {1 << 62})"))),
            ("invalid_shape", "33 dimensions", npy(header(shape=f"({'1, ' * 33})"))),
            ("invalid_dtype", "Python objects", npy(header(descr="'|O'"))),
            ("invalid_dtype", "Python objects", npy(header(descr="[('a', '<i4'), ('b', '|O')]"))),
            ("invalid_dtype", ".", npy(header(descr="'<q9'"))),
            ("invalid_dtype", r"\\x1b", npy(header(descr="'\\x1b[31m'"))),
            ("invalid_dtype", ".", npy(header(descr="7"))),
        ]
        for number, (error, says, content) in enumerate(cases):
            with self.subTest(number=number, says=says):
                (self.folder / "x.npy").write_bytes(content)
                message = self.refuse(error, "put", "x.npy", says=says)
                self.assertIn("x.npy", message)
        self.assertEqual(self.names(), [])

    def test_interrupted_put_leaves_nothing(self):
        terminal, process = self.start_stuck("put", self.sparse("big", 64 * MIB))
        self.until(lambda: [a["state"] for a in self.run_json("ls")] == ["writing"])
        self.assertEqual(self.info("big")["writer_pid"], process.pid)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(TIMEOUT_S), -signal.SIGINT)
        self.until(lambda: self.names() == [])
        self.until(lambda: self.daemon.segments() == [])
        os.close(terminal)

    def test_interrupted_get_leaves_nothing(self):
        self.run_text("put", self.sparse("big", 64 * MIB))
        before = sorted(self.folder.iterdir())
        terminal, process = self.start_stuck("get", "big", "back.npy")
        self.until(lambda: self.info("big")["views"] == 1)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(TIMEOUT_S), -signal.SIGTERM)
        self.assertEqual(sorted(self.folder.iterdir()), before)
        self.until(lambda: self.info("big")["views"] == 0)
        os.close(terminal)

    def sparse(self, name, size_bytes):
        path = self.folder / f"{name}.npy"
        path.write_bytes(npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size_bytes},)}}".encode(), data=b""))
        os.truncate(path, path.stat().st_size + size_bytes)
        return path

    def start_stuck(self, *args):
        """Starts cowctl with a standard error that takes nothing, so that it stands still at its progress bar."""
        terminal, slave = pty.openpty()
        termios.tcflow(slave, termios.TCOOFF)
        process = self.start(*args, stderr=slave)
        self.addCleanup(process.wait, TIMEOUT_S)
        self.addCleanup(process.kill)
        os.close(slave)
        return terminal, process


def npy(header, version=1, length=None, data=bytes(24)):
    """A .npy file with that text for a header; `length` is what the file says of it."""
    header += b"\n"
    length_field = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + length_field + header + data


class Evict(CowctlTest):
    def setUp(self):
        super().setUp()
        for name in ("old-1", "old-2", "new-1", "b"):
            self.put(name, np.zeros(MIB, dtype="u1"), "--evictable")

    def test_names_and_globs(self):
        report = self.run_json("evict", "--match", "old-*")
        self.assertEqual(sorted(report["names"]), ["old-1", "old-2"])
        self.assertGreaterEqual(report["freed_bytes"], 2 * MIB)
        self.assertRegex(self.run_text("evict", "new-1", "b"), r'\Aevicted .*"(b|new-1)"; \d.* freed at once\n\Z')
        self.assertEqual(self.names(), [])

    def test_all_or_none(self):
        self.refuse("not_found", "evict", "b", "x", says='"x"')
        self.refuse("not_found", "evict", "--match", "x*")
        self.run_text("pin", "old-1")
        self.refuse("pinned", "evict", "b", "old-1", says="pinned; unpin")
        self.assertEqual(len(self.names()), 4)

    def test_least_recently_used_goes_first(self):
        self.run_text("get", "old-1", "touched.npy")
        self.run_text("pin", "old-2")
        self.assertEqual(self.run_json("evict", "--lru", "1KiB")["names"], ["new-1"])
        self.assertEqual(self.run_json("evict", "--lru", "1.5MiB")["names"], ["b", "old-1"])
        done = self.cowctl("evict", "--lru", "1GB", "--json", code=1)
        self.assertEqual(json.loads(done.stdout)["names"], [])
        self.assertIn(b"freed 0 B of the 954 MiB that were asked for", done.stderr)
        self.assertEqual(self.names(), ["old-2"])

    def test_pin_and_unpin(self):
        self.assertEqual(self.run_json("pin", "old-*", "--match"), {"names": ["old-1", "old-2"], "pinned": True})
        self.assertTrue(self.info("old-1")["pinned"])
        self.assertEqual(self.run_text("unpin", "old-1"), 'unpinned "old-1"\n')
        self.assertFalse(self.info("old-1")["pinned"])
        self.assertTrue(self.info("old-2")["pinned"])
        self.refuse("not_found", "pin", "--match", "x*", says='"x\\*"')
        self.refuse("not_found", "unpin", "x")

    @unittest.skipUnless(os.geteuid() == 0, "needs a second user")
    def test_other_users(self):
        self.put("open", np.arange(3), "--mode", "0644")
        reader = {"user": NOBODY, "extra_groups": []}
        self.refuse("permission_denied", "get", "b", "/dev/null", "--force", **reader)
        self.refuse("permission_denied", "evict", "open", **reader)
        self.refuse("permission_denied", "pin", "open", **reader)
        self.refuse("permission_denied", "put", self.save("open", np.arange(3)), "--replace", **reader)
        self.refuse("permission_denied", "shutdown", **reader)
        self.assertEqual(len(self.names()), 5)


class Capacity(CowctlTest):
    flags = ("--capacity", "8MiB")

    def test_too_large(self):
        self.put("x", np.zeros(5 * MIB, dtype="u1"), "--pin")
        self.save("y", np.zeros(4 * MIB, dtype="u1"))
        message = self.refuse("out_of_memory", "put", "y.npy")
        for word in ("free", "evictable", "pinned", "MiB"):
            self.assertIn(word, message)
        self.assertEqual(self.names(), ["x"])

    def test_evictable_arrays_make_room(self):
        for name in ("a", "b"):
            self.put(name, np.zeros(3 * MIB, dtype="u1"), "--evictable")
        self.put("c", np.zeros(3 * MIB, dtype="u1"))
        self.assertEqual(self.names(), ["b", "c"])


class Show(CowctlTest):
    def test_nothing_there(self):
        self.assertEqual(self.cowctl("ls").stderr, b"no arrays; put one with `cowctl put FILE.npy`\n")
        self.assertIn(b"no result sets", self.cowctl("results").stderr)
        self.assertEqual(self.run_json("ls"), [])
        self.assertEqual(self.run_json("results"), [])

    def test_ls_as_json(self):
        self.put("x", np.asfortranarray(np.zeros((3, 5), dtype="<f4")))
        (array,) = self.run_json("ls")
        self.assertLessEqual(LS_KEYS, set(array))
        self.assertEqual((array["name"], array["version"], array["dtype"], array["shape"], array["order"], array["bytes"]),
                         ("x", 1, "<f4", [3, 5], "F", 60))
        self.assertEqual((array["state"], array["views"], array["pinned"], array["mode"]), ("sealed", 0, False, "0600"))
        self.assertIn(array["protection"], ("advisory", "verified", "enforced"))
        self.assertRegex(array["created"], rf"\A{ISO_TIME}\Z")
        self.assertRegex(array["last_used"], rf"\A{ISO_TIME}\Z")
        self.assertTrue(os.path.exists("/dev/shm" + array["segment"]))

    def test_ls_as_a_table(self):
        self.put("train", np.zeros((3, 5), dtype="<f4"))
        self.put("日本", np.zeros(200, dtype="<i8"))
        table = self.run_text("ls")
        self.assertNotIn("\033", table)
        header, train, wide = table.splitlines()
        self.assertEqual(header.split(), "NAME VERSION DTYPE SHAPE SIZE STATE PROTECTION VIEWS PINNED OWNER CREATED".split())
        self.assertRegex(train, r"\Atrain +1  <f4 +\(3, 5\) +60 B  sealed +\w+ +0  no +\S+ +(now|\d+ s ago)\Z")
        self.assertIn("1.56 KiB", wide)
        columns = [sum(2 if unicodedata.east_asian_width(c) == "W" else 1 for c in line[:line.index(word)])
                   for line, word in ((header, "DTYPE"), (train, "<f4"), (wide, "<i8"))]
        self.assertEqual(len(set(columns)), 1)

    def test_ls_with_a_glob(self):
        for name in ("ab", "ac", "b"):
            self.put(name, np.arange(3))
        for pattern, names in (("a*", ["ab", "ac"]), ("?", ["b"]), ("?b", ["ab"]), ("ab", ["ab"])):
            self.assertEqual([array["name"] for array in self.run_json("ls", "--match", pattern)], names)

    def test_stat(self):
        self.put("x", np.zeros(3 * MIB, dtype="u1"), "--pin")
        array = self.run_json("stat", "x")
        self.assertLessEqual(LS_KEYS | {"resident_bytes", "huge_bytes", "holders"}, set(array))
        self.assertGreaterEqual(array["resident_bytes"], 3 * MIB)
        self.assertRegex(self.run_text("stat", "x"), r"(?s)name +x\n.*shape +\(3145728,\)\n.*size +3 MiB\n.*pinned +yes\n")
        daemon = self.run_json("stat")
        self.assertEqual((daemon["instance"], daemon["socket"], daemon["pid"], daemon["arrays"], daemon["capacity_bytes"]),
                         (self.daemon.instance, self.daemon.socket, self.daemon.process.pid, 1, 256 * MIB))
        self.assertGreaterEqual(daemon["pinned_bytes"], 3 * MIB)
        self.assertRegex(self.run_text("stat"), r"(?s)capacity +256 MiB\nused +3[.\d]* MiB \(1 %\)\n")
        self.refuse("not_found", "stat", "y", says='"y".*cowctl ls')
        self.refuse("not_found", "stat", "ping", says='"ping"')

    def test_clients(self):
        (client,) = self.run_json("clients")
        self.assertEqual(client["command"], "cowctl clients")
        self.assertRegex(self.run_text("clients"), r"\A *SESSION +PID +USER +COMMAND .*\n.* cowctl clients ")

    def test_ping(self):
        answer = self.run_json("ping")
        self.assertGreater(answer["round_trip_us"], 0)
        self.assertEqual(answer["pid"], self.daemon.process.pid)
        self.assertRegex(self.run_text("ping"), rf"\A\d+ us to cowmgr 0\.1\.0, instance {self.daemon.instance}, pid \d+, at ")

    def test_shutdown(self):
        self.put("x", np.arange(3))
        self.assertIn(f"the daemon at {self.daemon.socket} is stopping; its arrays stay", self.run_text("shutdown"))
        self.assertEqual(self.daemon.process.wait(TIMEOUT_S), 0)
        self.refuse("no_daemon", "ls", code=3)

    def test_a_daemon_that_is_stopped(self):
        self.daemon.process.send_signal(signal.SIGSTOP)
        self.refuse("timed_out", "ping", "--timeout", "50ms", says="does not answer; is it stopped?")
        self.refuse("timed_out", "evict", "x", "--timeout", "50ms", says="does not answer; is it stopped?")
        self.daemon.process.send_signal(signal.SIGCONT)
        self.run_text("ping", "--timeout", "1min")

    def test_where_the_daemon_is(self):
        nowhere = self.env(COWMGR_SOCKET="/nowhere")
        self.assertEqual(self.run_text("--socket", self.daemon.socket, "ping", env=nowhere)[-5:], "sock\n")
        self.assertEqual(self.run_text("ping", "--socket", self.daemon.socket, env=nowhere)[-5:], "sock\n")
        self.refuse("no_daemon", "ping", code=3, env=nowhere, says="/nowhere")


if __name__ == "__main__":
    unittest.main()
