#!/usr/bin/env python3
"""What cowctl fsck finds, with and without a daemon. Usage: cowctl_fsck_test.py BIN_DIR"""

import os
import unittest
from pathlib import Path

import numpy as np
from cowctl_fixture import CowctlTest, Maker


class Fsck(CowctlTest):
    """What is left of a daemon that was killed."""

    def fsck(self, *flags, **how):
        return self.run_json("fsck", self.daemon.instance, *flags, **how)

    def stop_daemon(self):
        self.daemon.kill()
        for file in self.daemon.files():
            os.unlink(file)

    def test_sees_a_daemon_whose_lock_file_was_removed(self):
        self.put("x", np.arange(3))
        os.unlink(f"/dev/shm/cowmgr.{self.daemon.instance}.lock")
        (instance,) = self.fsck()
        self.assertEqual(instance["daemon_pid"], self.daemon.process.pid)
        self.refuse("busy", "fsck", self.daemon.instance, "--repair", says="stop it first")

    def test_lists_what_there_is_without_a_daemon(self):
        self.put("x", np.arange(3), "--pin")
        (instance,) = self.fsck()
        self.assertEqual((instance["instance"], instance["daemon_pid"]), (self.daemon.instance, self.daemon.process.pid))
        self.daemon.kill()
        (instance,) = self.fsck()
        self.assertNotIn("daemon_pid", instance)
        (file,) = instance["files"]
        self.assertEqual((file["name"], file["version"], file["state"], file["pinned"]), ("x", 1, "sealed", True))
        text = self.cowctl("fsck").stdout.decode()  # on standard error stands what it thinks of others' instances
        self.assertIn(f"instance {self.daemon.instance}: no daemon", text)
        self.assertRegex(text, r"sealed +.*x +1 ")

    def test_repairs_what_nobody_can_use(self):
        self.put("x", np.arange(3))
        maker = Maker(self, "s", "dense")
        self.refuse("busy", "fsck", self.daemon.instance, "--repair", says="stop it first")
        self.daemon.kill()
        damaged = Path(f"/dev/shm/cowmgr.{self.daemon.instance}.quarantine.00000000000000ff")
        damaged.write_bytes(b"damage")
        done = self.cowctl("fsck", self.daemon.instance)
        text, note = done.stdout.decode(), done.stderr.decode()
        self.assertIn("1 of no use to anybody", note, "the maker of the set may come back to it")
        self.assertRegex(text, rf"results +.* s +.* of process {maker.process.pid}\n")
        maker.end()
        self.assertEqual(sorted(file["state"] for file in self.fsck()[0]["files"]), ["damaged", "results", "sealed", "unsealed"])
        self.assertIn(b"3 of no use to anybody", self.cowctl("fsck", self.daemon.instance).stderr)
        repaired = self.fsck("--repair")[0]["files"]
        self.assertEqual([file["removed"] for file in repaired if file["state"] == "sealed"], [False])
        self.assertEqual(len([file for file in repaired if file["removed"]]), 3)
        self.assertEqual([file["name"] for file in self.fsck()[0]["files"]], ["x"])
        self.assertEqual(len(self.daemon.files()), 1, "and no lock")

    def test_nothing_there(self):
        self.assertEqual(self.run_json("fsck", "no-such-instance"), [])
        self.assertIn(b"nothing in shared memory", self.cowctl("fsck", "no-such-instance").stderr)
        self.refuse("invalid_argument", "fsck", "../x", says="letters")


if __name__ == "__main__":
    unittest.main()
