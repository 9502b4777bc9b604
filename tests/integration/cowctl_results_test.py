#!/usr/bin/env python3
"""Transcripts of `cowctl results` against a real daemon and a real set. Usage: cowctl_results_test.py BIN_DIR"""

import os
import pty
import re
import select
import subprocess
import unittest

from cowctl_fixture import TIMEOUT_S, CowctlTest, Maker


class Results(CowctlTest):
    def slots(self, name, *flags):
        (results,) = self.run_json("results", name, *flags)
        return results["slot_list"]

    def test_lists_sets(self):
        Maker(self, "dense", "dense").tell("lease", "commit", "lease")
        Maker(self, "ragged", "ragged")
        dense, ragged = self.run_json("results")
        self.assertEqual((dense["name"], dense["state"], dense["kind"], dense["bytes"]), ("dense", "running", "dense", 80))
        self.assertEqual([dense[key] for key in ("slots", "committed", "leased", "free", "failed")], [4, 1, 1, 2, 0])
        self.assertEqual((ragged["name"], ragged["kind"]), ("ragged", "ragged"))
        text = self.run_text("results", "--match", "r*")
        self.assertIn("ragged", text)
        self.assertNotIn("dense", text)

    def test_shows_who_holds_which_slot(self):
        maker = Maker(self, "s", "dense")
        maker.tell("lease", "commit", "lease")
        (slot,) = self.slots("s")
        self.assertEqual((slot["slot"], slot["state"], slot["attempt"]), (1, "leased", 1))
        self.assertEqual((slot["pid"], slot["command"]), (maker.process.pid, "maker"))
        line = self.run_text("results", "s").splitlines()[-1]
        self.assertRegex(line, rf"\A +1 +leased +{maker.process.pid} \(maker\) +1 +(now|\d+ s ago) +24 B\Z")

    def test_shows_every_slot_on_request(self):
        Maker(self, "s", "dense").tell("lease", "commit", "lease")
        slots = self.slots("s", "--slots")
        self.assertEqual([slot["state"] for slot in slots], ["committed", "leased", "free", "free"])
        self.assertEqual(slots[0]["bytes"], 24)
        Maker(self, "r", "ragged").tell("lease", "commit")
        self.assertEqual(self.slots("r", "--slots")[0]["bytes"], len("seven b"))

    def test_tells_why_a_slot_failed(self):
        Maker(self, "s", "ragged").tell("lease", "fail")
        (slot,) = self.slots("s")
        self.assertEqual((slot["state"], slot["reason"]), ("failed", "it is broken"))
        self.assertIn("it is broken", self.run_text("results", "s"))

    def test_follows_to_the_end(self):
        maker = Maker(self, "s", "dense")
        follower = self.start("results", "s", "--follow", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        maker.tell(*["lease", "commit"] * 4)
        out, err = follower.communicate(timeout=TIMEOUT_S)
        self.assertEqual((follower.returncode, out, err), (0, b'"s" is done: 4 slots\n', b""))

    def test_follows_with_a_bar_on_a_terminal(self):
        maker = Maker(self, "s", "dense")
        terminal, slave = pty.openpty()
        self.addCleanup(os.close, terminal)
        follower = self.start("results", "s", "--follow", stdout=slave, stderr=slave)
        os.close(slave)
        seen = b""
        while b"0 of 4" not in seen:
            self.assertTrue(select.select([terminal], [], [], TIMEOUT_S)[0], seen)
            seen += os.read(terminal, 4096)
        maker.tell(*["lease", "commit"] * 4)
        while b"is done" not in seen:
            self.assertTrue(select.select([terminal], [], [], TIMEOUT_S)[0], seen)
            seen += os.read(terminal, 4096)
        self.assertIn(b"100%", seen)
        self.assertEqual(follower.wait(TIMEOUT_S), 0)

    def test_follows_to_a_failure(self):
        maker = Maker(self, "s", "ragged")
        follower = self.start("results", "s", "--follow", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        maker.tell("lease", "fail", *["lease", "commit"] * 3)
        out, err = follower.communicate(timeout=TIMEOUT_S)
        self.assertEqual((follower.returncode, out), (1, b""))
        self.assertIn(b"slot 0: it is broken", err)

    def test_cancels(self):
        Maker(self, "s", "dense").tell("lease")
        self.assertEqual(self.run_text("results", "s", "--cancel"), 'cancelled "s"\n')
        self.assertEqual(self.run_json("results")[0]["state"], "cancelled")
        self.refuse("cancelled", "results", "s", says="was cancelled")

    def test_refuses_what_cannot_be(self):
        self.refuse("not_found", "results", "nothing", says="no result set")
        self.refuse("not_found", "results", "n*", says="no result set")
        done = self.cowctl("results", "s", "--follow", "--cancel", code=2)
        self.assertIsNotNone(re.search(rb"--follow|--cancel", done.stderr))


if __name__ == "__main__":
    unittest.main()
