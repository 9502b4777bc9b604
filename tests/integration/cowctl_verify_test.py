#!/usr/bin/env python3
"""Transcripts of `cowctl verify` against a real daemon. Usage: cowctl_verify_test.py BIN_DIR"""

import json
import subprocess
import unittest
from pathlib import Path

import numpy as np
from cowctl_fixture import CowctlTest


class Verify(CowctlTest):
    def test_good_ones(self):
        self.assertIn(b"no arrays with a checksum; take one", self.cowctl("verify").stderr)
        self.put("with", np.arange(1000), "--checksum")
        self.put("without", np.arange(1000))
        report, = self.run_json("verify")
        self.assertEqual((report["name"], report["result"], report["bytes"]), ("with", "good", 8000))
        self.assertRegex(report["checksum"], r"\A[0-9a-f]{16}\Z")
        self.assertEqual(self.run_json("stat", "with")["checksum"], report["checksum"])
        self.assertNotIn("checksum", self.run_json("stat", "without"))
        done = self.cowctl("verify")
        self.assertRegex(done.stdout.decode(), r"(?m)^with +1 +7.81 KiB +good$")
        self.assertEqual(done.stderr, b"1 without a checksum, not read\n")
        self.assertEqual(self.run_json("verify", "without"), [])

    def test_a_bad_one(self):
        self.put("bad", np.arange(1000), "--checksum")
        self.put("good", np.arange(1000), "--checksum")
        segment = Path("/dev/shm" + self.info("bad")["segment"])
        self.daemon.kill()  # while it runs it would see who writes
        segment.chmod(0o1600)
        with segment.open("r+b") as file:
            file.seek(5000)
            file.write(b"x")
        segment.chmod(0o1400)
        self.start_next()
        while self.start("ping", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait() != 0:
            pass
        done = self.cowctl("verify", "--json", code=1)
        self.assertEqual(done.stderr, b"")
        results = {report["name"]: report["result"] for report in json.loads(done.stdout)}
        # The daemon looks too, in the background, and may have come first.
        self.assertIn(results["bad"], ("corrupted", "tampered"))
        self.assertEqual(results["good"], "good")
        self.until(lambda: self.info("bad")["state"] == "tampered")
        self.assertRegex(self.cowctl("verify", code=1).stdout.decode(), r"(?m)^bad +1 .* tampered$")


if __name__ == "__main__":
    unittest.main()
