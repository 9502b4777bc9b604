"""A test of cowctl with a daemon of its own. Its module is called with BIN_DIR [UNITTEST ARGS].

Every test ends with the daemon's SIGTERM: it must exit with 0 and leave nothing in /dev/shm.
"""

import glob
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from programs import TIMEOUT_S, bin_directory, start_daemon  # noqa: E402  (found by the line above)

BIN = bin_directory()
MIB = 1 << 20
NOBODY = 65534
COUNTER = itertools.count(1)


class Daemon:
    """A running cowmgr; it serves when this returns."""

    def __init__(self, folder, *flags):
        self.instance = f"t{os.getpid()}-{next(COUNTER)}"
        self.socket = f"{folder}/s.sock"
        self.process = start_daemon([*self.command("warning"), "--purge", *flags], folder)

    def command(self, log_level):
        return [BIN / "cowmgr", "--socket", self.socket, "--instance", self.instance, "--log-level", log_level]

    def kill(self):
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_S)

    def files(self):
        return glob.glob(f"/dev/shm/cowmgr.{self.instance}.*")

    def segments(self):
        return [file for file in self.files() if not file.endswith(".lock")]


class CowctlTest(unittest.TestCase):
    flags = ("--capacity", "256MiB")

    def setUp(self):
        self.make_folder()
        self.daemon = Daemon(self.folder, *self.flags)
        self.addCleanup(self.stop_daemon)

    def make_folder(self):
        folder = tempfile.TemporaryDirectory(prefix="cowctl-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.folder.chmod(0o755)

    def stop_daemon(self):
        self.assertEqual(self.daemon.stop(), 0)
        self.assertEqual(self.daemon.files(), [])

    def start_next(self):
        """The daemon that follows one that was killed; it may not serve yet."""
        self.daemon.process = subprocess.Popen(self.daemon.command("off"))
        self.addCleanup(lambda: self.daemon.process.wait(TIMEOUT_S))
        self.addCleanup(self.cowctl, "shutdown", "--purge")

    def env(self, **extra):
        clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COWMGR_SOCKET")}
        return clean | {"COWMGR_SOCKET": self.daemon.socket, "TERM": "xterm"} | extra

    def start(self, *args, **how):
        how.setdefault("env", self.env())
        return subprocess.Popen([BIN / "cowctl", *args], cwd=self.folder, **how)

    def cowctl(self, *args, code=0, **how):
        how.setdefault("env", self.env())
        done = subprocess.run([BIN / "cowctl", *args], cwd=self.folder, capture_output=True, timeout=TIMEOUT_S, check=False,
                              **how)
        self.assertEqual(done.returncode, code, done)
        return done

    def run_text(self, *args, **how):
        done = self.cowctl(*args, **how)
        self.assertEqual(done.stderr, b"")
        return done.stdout.decode()

    def run_json(self, *args, **how):
        return json.loads(self.run_text(*args, "--json", **how))

    def refuse(self, error, *args, says=".", code=1, **how):
        """Asks twice, for text and for JSON: both refuse, with the same words."""
        done = self.cowctl(*args, code=code, **how)
        text = done.stderr.decode()
        self.assertEqual(done.stdout, b"")
        self.assertRegex(text, r"\Acowctl: [^\n]+\n\Z")
        self.assertIsNone(re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text), text)
        self.assertRegex(text, says)
        done = self.cowctl("--json", *args, code=code, **how)
        self.assertEqual(done.stdout, b"")
        report = json.loads(done.stderr)
        self.assertEqual(set(report), {"error", "message"})
        self.assertEqual(report["error"], error, report)
        return report["message"]

    def save(self, name, array):
        path = self.folder / f"{name}.npy"
        np.save(path, array)
        return path

    def put(self, name, array, *flags):
        return self.run_json("put", self.save(name, array), *flags)

    def names(self):
        return [array["name"] for array in self.run_json("ls")]

    def info(self, name):
        return next(array for array in self.run_json("ls") if array["name"] == name)

    def until(self, condition):
        """Asks again and again, a round trip to the daemon apart: of what is waited for nobody tells us."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            self.assertLess(time.monotonic(), deadline, "it did not happen")
            self.run_text("ping")

    def assert_same(self, left, right):
        self.assertEqual(left.dtype, right.dtype)
        self.assertEqual(left.shape, right.shape)
        self.assertEqual(left.flags.f_contiguous, right.flags.f_contiguous)
        self.assertEqual(left.tobytes("A"), right.tobytes("A"))


class Maker:
    """A program that has made a set, and does with it what it is told."""

    def __init__(self, test, name, kind):
        self.process = subprocess.Popen([BIN / "test_results_maker", name, kind], env=test.env(),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        test.addCleanup(self.end)
        self.hear(test)
        self.test = test

    def hear(self, test):
        test.assertEqual(self.process.stdout.readline(), "done\n")

    def tell(self, *words):
        for word in words:
            print(word, file=self.process.stdin, flush=True)
            self.hear(self.test)

    def end(self):
        self.process.stdin.close()  # which ends it
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()


def example_arrays():
    values = np.arange(24) % 7
    for code in "? b B h H i I q Q e f d g F D G >f8 >i2 >c16 >u8".split():
        yield code.strip("?") or "bool", values.astype(code).reshape(4, 6)
    yield "datetime", np.datetime64("2026-01-31T12:00", "ns") + values.astype("m8[ns]")
    yield "timedelta", values.astype("m8[25us]")
    yield "big-endian-time", values.astype(">M8[s]")
    yield "bytes", np.array([b"one", b"", b"three\x80"])
    yield "text", np.array(["eins", "größer", "三", "🙂"])
    yield "big-endian-text", np.array(["eins", "zwei"]).astype(">U7")
    yield "void", np.frombuffer(bytes(range(48)), dtype="V16")
    yield "struct", np.array([(1, 2.5, b"x"), (3, 4.5, b"yz")], dtype=[("a", "<i4"), ("b", ">f8"), ("größe", "S2")])
    yield "nested", np.zeros(3, dtype=[("p", [("x", "f4"), ("y", "f4")]), ("m", "i2", (2, 3))])
    yield "padded", np.ones(5, dtype=np.dtype([("a", "u1"), ("b", "f8")], align=True))
    yield "fortran", np.asfortranarray(values.reshape(2, 3, 4))
    yield "zero-d", np.array(42.5)
    yield "empty", np.zeros((3, 0, 2), dtype="i2")
    yield "axes-32", np.arange(4.0).reshape((1,) * 15 + (2,) + (1,) * 15 + (2,))
    yield "page", np.arange(4096, dtype="u1")
    yield "page-and-one", np.arange(4097, dtype="u1")
    yield "large", np.arange(3 * MIB + 17, dtype="<u4")
