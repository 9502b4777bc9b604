#!/usr/bin/env python3
"""What cowctl takes for a name, and what it prints where. Usage: cowctl_names_test.py BIN_DIR"""

import json
import os
import subprocess
import unittest

import numpy as np
from cowctl_fixture import MIB, NOBODY, TIMEOUT_S, CowctlTest, Maker


class Names(CowctlTest):
    def setUp(self):
        super().setUp()
        for name in ("w0", "w[0]", "*"):
            self.run_text("put", self.save("x", np.arange(3)), f"--name={name}")

    def test_a_name_is_a_name(self):
        for name in ("w[0]", "*"):
            self.assertEqual([array["name"] for array in self.run_json("ls", name)], [name])
            self.assertEqual(self.run_json("pin", name)["names"], [name])
            self.assertEqual(self.run_json("unpin", name)["names"], [name])
            self.assertEqual(self.run_json("evict", name)["names"], [name])
            self.refuse("not_found", "evict", name)
        self.assertEqual(self.names(), ["w0"])

    def test_a_pattern_is_asked_for(self):
        self.assertEqual([array["name"] for array in self.run_json("ls", "--match", "w*")], ["w0", "w[0]"])
        self.assertEqual([array["name"] for array in self.run_json("ls", "w?", "--match")], ["w0"])
        self.assertEqual([array["name"] for array in self.run_json("ls", "--match", "w[*")], ["w[0]"])
        self.assertEqual([array["name"] for array in self.run_json("ls", "--match", r"\*")], ["*"])
        self.assertEqual(self.run_json("pin", "--match", "w*")["names"], ["w0", "w[0]"])
        self.assertEqual(self.run_json("unpin", "--match", "w*")["names"], ["w0", "w[0]"])
        self.assertEqual(self.run_json("evict", "--match", "*")["names"], ["w0", "w[0]", "*"])

    def test_what_a_pattern_passed_over_is_named(self):
        self.run_text("pin", "w0")
        done = self.cowctl("evict", "--match", "w*")
        self.assertRegex(done.stdout.decode(), r'\Aevicted "w\[0\]"; ')
        self.assertEqual(done.stderr, b'passed over what is pinned: "w0"\n')
        self.run_text("put", self.save("x", np.arange(3)), "--name=w1")
        self.assertEqual(self.run_json("evict", "--match", "w*")["passed_over"], ["w0"])

    def test_patterns_need_a_name(self):
        for args in (["ls", "--match"], ["evict", "--match"], ["evict", "--match", "--lru", "1G"], ["results", "--match"],
                     ["results", "--cancel"], ["results", "r*", "--match", "--follow"]):
            self.refuse("invalid_argument", *args, code=2, says=f"see `cowctl {args[0]} --help`")


class WhereItGoes(CowctlTest):
    """Tables and values to standard output, sentences to standard error; JSON is JSON also where there is nothing."""

    def check_nothing(self, *args, says, code):
        done = self.cowctl(*args, code=code)
        self.assertEqual(done.stdout, b"")
        self.assertRegex(done.stderr.decode(), says)
        self.assertEqual(json.loads(self.cowctl(*args, "--json", code=code).stdout), [])

    def test_nothing_at_all(self):
        self.check_nothing("ls", says="no arrays; put one", code=0)
        self.check_nothing("results", says="no result sets; programs make them", code=0)
        self.check_nothing("verify", says="no arrays with a checksum", code=0)
        self.check_nothing("fsck", "no-such-instance", says="nothing in shared memory", code=0)

    def test_nothing_of_what_was_asked_for(self):
        self.put("x", np.arange(3))
        self.check_nothing("ls", "nomatch", says='cowctl: there is no array "nomatch"', code=1)
        self.check_nothing("ls", "--match", "no*", says='cowctl: no array has a name that matches "no\\*"', code=1)
        self.check_nothing("verify", "nomatch", says='there is no array "nomatch"', code=1)
        self.check_nothing("results", "--match", "r*", says='no result set has a name that matches "r\\*"', code=1)
        self.assertEqual(json.loads(self.cowctl("ls", "nomatch", "--json", code=1).stderr)["error"], "not_found")

    def test_less_than_was_asked_for(self):
        self.put("pinned", np.zeros(MIB, dtype="u1"), "--pin")
        self.put("x", np.zeros(MIB, dtype="u1"))
        done = self.cowctl("evict", "--lru", "1GiB", code=1)
        self.assertRegex(done.stdout.decode(), r'\Aevicted "x"; 1[.\d]* MiB freed at once\n\Z')
        self.assertRegex(done.stderr.decode(), "freed 1[.0-9]* MiB of the 1 GiB that were asked for; all else is pinned")
        self.assertEqual(self.cowctl("evict", "--lru", "1GiB", code=1).stdout, b"")

    @unittest.skipUnless(os.geteuid() == 0, "needs a second user")
    def test_nothing_that_one_may_read(self):
        self.put("x", np.arange(3))
        done = self.cowctl("ls", user=NOBODY, extra_groups=[])
        self.assertRegex(done.stderr.decode(), r"\Ano arrays that user \w+ may read; ")

    def test_help_of_a_command_is_whole(self):
        for command in ("ls", "put", "results", "ping"):
            text = self.run_text(command, "--help")
            for option in ("--socket", "--json", "--wait"):
                self.assertIn(option, text)
        self.refuse("invalid_argument", "ls", "--bogus", code=2, says="see `cowctl ls --help`")
        self.refuse("invalid_argument", "bogus", code=2, says="see `cowctl --help`")


class Streams(CowctlTest):
    def test_get_to_standard_output(self):
        array = np.arange(1_000_000)
        self.put("x", array)
        for more in ([], ["--json"]):
            done = self.cowctl("get", "x", "-", *more)
            self.assertEqual(done.stdout, (self.folder / "x.npy").read_bytes())
            self.assertEqual(done.stderr, b"")
        self.assertFalse((self.folder / "-").exists())
        with open(self.folder / "out.npy", "wb") as out:
            self.start("get", "x", "-", stdout=out).wait(TIMEOUT_S)
        self.assertEqual((self.folder / "out.npy").read_bytes(), (self.folder / "x.npy").read_bytes())

    def test_put_from_standard_input(self):
        for size in (0, 3, 3_000_000):
            path = self.save("x", np.arange(size))
            self.run_text("put", "-", "--name", "pipe", "--replace", input=path.read_bytes())
            self.run_text("get", "pipe", "back.npy", "--force")
            self.assertEqual((self.folder / "back.npy").read_bytes(), path.read_bytes())
        with open(path, "rb") as file:
            self.run_text("put", "-", "--name", "file", stdin=file)
        self.assertEqual(self.info("file")["bytes"], 24_000_000)

    def test_from_one_to_the_other(self):
        self.put("x", np.arange(100_000))
        get = self.start("get", "x", "-", stdout=subprocess.PIPE)
        self.run_text("put", "-", "--name", "y", stdin=get.stdout)
        get.stdout.close()
        self.assertEqual(get.wait(TIMEOUT_S), 0)
        self.assertEqual(self.run_json("stat", "y")["bytes"], 800_000)

    def test_what_comes_in_is_checked(self):
        whole = self.save("x", np.arange(1000)).read_bytes()
        for length, says in ((0, "magic"), (9, "ends within"), (60, "ends within its header"), (128, "ends after 0 of 8000 bytes"),
                             (len(whole) - 1, "ends after 7999 of 8000 bytes")):
            self.refuse("invalid_file", "put", "-", "--name", "x", input=whole[:length], says=says)
        self.until(lambda: self.daemon.segments() == [])
        self.refuse("invalid_argument", "put", "-", code=2, input=whole, says="--name")

    def test_a_file_of_that_name(self):
        (self.folder / "-").write_bytes(self.save("x", np.arange(3)).read_bytes())
        self.run_text("put", "./-")
        self.assertEqual(self.names(), ["-"])


class Files(CowctlTest):
    def test_only_npy_is_dropped(self):
        for file in ("data.2024", "data.2025", "data.npy", "x.NPY", ".npy"):
            (self.folder / file).write_bytes(self.save("in", np.arange(3)).read_bytes())
            self.run_text("put", file)
        self.assertEqual(self.names(), ["data.2024", "data.2025", "data", "x.NPY", ".npy"])

    def test_a_file_that_is_overwritten_keeps_its_mode(self):
        self.put("x", np.arange(3))
        file = self.folder / "old.npy"
        for mode in (0o600, 0o640, 0o444, 0o666):
            file.unlink(missing_ok=True)
            file.touch()
            file.chmod(mode)
            self.run_text("get", "x", "old.npy", "--force", umask=0o022)
            self.assertEqual(file.stat().st_mode & 0o7777, mode)
            self.assertEqual(np.load(file).shape, (3,))

    @unittest.skipUnless(os.geteuid() == 0, "needs a second user")
    def test_a_file_that_is_overwritten_keeps_its_owner(self):
        self.put("x", np.arange(3))
        file = self.folder / "old.npy"
        file.touch(0o640)
        os.chown(file, NOBODY, NOBODY)
        self.run_text("get", "x", "old.npy", "--force")
        self.assertEqual((file.stat().st_uid, file.stat().st_gid, file.stat().st_mode & 0o777), (NOBODY, NOBODY, 0o640))

    def test_a_full_disk_is_no_want_of_room_for_arrays(self):
        self.put("x", np.arange(3))
        self.refuse("os_failure", "get", "x", "/dev/full", "--force", says="No space left.*free space there")


class NextDaemon(CowctlTest):
    def test_a_command_waits_for_a_daemon(self):
        self.daemon.kill()
        self.refuse("no_daemon", "ls", code=3)
        waiting = self.start("ls", "--wait", f"{TIMEOUT_S}s", "--json", stdout=subprocess.PIPE)
        self.start_next()
        self.assertEqual(json.loads(waiting.communicate(timeout=TIMEOUT_S)[0]), [])
        self.assertEqual(waiting.returncode, 0)

    def test_a_command_finds_the_next_daemon(self):
        maker = Maker(self, "s", "dense")
        follower = self.start("results", "s", "--follow", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.until(lambda: "cowctl results" in [client["command"] for client in self.run_json("clients")])
        self.daemon.kill()
        self.start_next()
        maker.tell(*["lease", "commit"] * 4)
        out, err = follower.communicate(timeout=TIMEOUT_S)
        self.assertEqual((follower.returncode, out, err), (0, b'"s" is done: 4 slots\n', b""))

    def test_durations(self):
        self.run_text("ping", "--wait", "500ms")
        self.run_text("ping", "--wait", "1.5")
        for text in ("", "soon", "-1s", "1y", "1e30"):
            self.refuse("invalid_argument", "ping", "--wait", text, code=2, says="is not a duration")


if __name__ == "__main__":
    unittest.main()
