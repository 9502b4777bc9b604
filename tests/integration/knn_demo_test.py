#!/usr/bin/env python3
"""Transcripts of knn-demo: right answers, one copy of the data, nothing left behind. Usage: knn_demo_test.py BIN_DIR

The answers are compared with those of tests/unit/knn_oracle.py, which shares no code with the programs.
"""

import contextlib
import functools
import glob
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "unit")]
import knn_oracle  # noqa: E402  (found by the line above)
from programs import TIMEOUT_S, bin_directory, start_daemon  # noqa: E402  (likewise)

BIN = bin_directory()
DATA = Path("/usr/share/datasets/fashion-mnist")
ORACLE_ROWS = 500
TRAIN_BYTES = 60_000 * 784 * 4
TEST_ROWS = 10_000
WORKERS = 4
CORRECT = 8554  # of TEST_ROWS, k = 5: counted once with the oracle
ARRAYS = {"fashion-mnist/train/images", "fashion-mnist/train/labels", "fashion-mnist/test/images",
          "fashion-mnist/test/predictions"}
INSTANCES = itertools.count()


@functools.cache
def oracle(k):
    train = knn_oracle.read_pixels(DATA / "train-images-idx3-ubyte.gz")
    labels = knn_oracle.read_idx(DATA / "train-labels-idx1-ubyte.gz")
    test = knn_oracle.read_pixels(DATA / "t10k-images-idx3-ubyte.gz")[:ORACLE_ROWS]
    return knn_oracle.predict(test, train, labels, k)


def counts_memory_alone():
    """The thread sanitizer keeps notes about all memory that is read, several times as large."""
    return b"__tsan_init" not in (BIN / "knn-worker").read_bytes()


class Demo:
    """A running knn-demo, whose workers have started when this returns."""

    def __init__(self, folder, *flags):
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen([BIN / "knn-demo", *flags], stdout=subprocess.PIPE, stderr=self.errors,
                                        env=os.environ | {"XDG_RUNTIME_DIR": str(folder)})
        self.output = ""
        self.workers = []
        self.daemon = None  # its own
        for line in iter(self.process.stdout.readline, b""):
            self.output += line.decode()
            if line.startswith(b"Their processes: "):
                self.workers = [int(pid) for pid in line.split()[2:]]
                break
        else:
            raise AssertionError(f"it did not start: {self.process.wait()} {self.error_text()}")
        if "--socket" not in flags:
            self.find_daemon(folder)
        self.pidfds = {}  # of all that had not ended by now: a short run may be over
        for pid in (*self.daemons(), *self.workers):
            with contextlib.suppress(ProcessLookupError):
                self.pidfds[pid] = os.pidfd_open(pid)

    def find_daemon(self, folder):
        for self.socket in glob.glob(f"{folder}/*/cowmgr.sock"):
            pong = subprocess.run([BIN / "cowctl", "--socket", self.socket, "--json", "ping"], capture_output=True,
                                  check=False, timeout=TIMEOUT_S)
            if pong.returncode == 0:
                self.daemon = json.loads(pong.stdout)["pid"]

    def daemons(self):
        return [self.daemon] if self.daemon else []

    def error_text(self):
        self.errors.seek(0)
        return self.errors.read().decode()

    def wait(self):
        self.output += self.process.stdout.read().decode()
        return self.process.wait(TIMEOUT_S)

    def has_ended(self, pid, timeout_s=0):
        return pid not in self.pidfds or bool(select.select([self.pidfds[pid]], [], [], timeout_s)[0])

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        for pid, pidfd in self.pidfds.items():
            if not self.has_ended(pid):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


class OtherDaemon:
    """A daemon that is not the demo's own."""

    def __init__(self, folder):
        self.socket = f"{folder}/other.sock"
        self.instance = f"knn-{os.getpid()}-{next(INSTANCES)}"
        self.command = [BIN / "cowmgr", "--socket", self.socket, "--instance", self.instance, "--log-level", "error"]
        self.process = start_daemon(self.command, folder)

    def kill_and_start(self):
        """The next one may not serve yet."""
        self.process.kill()
        self.process.wait()
        self.process = subprocess.Popen(self.command)

    def cowctl(self, *args):
        done = subprocess.run([BIN / "cowctl", "--socket", self.socket, "--json", *args], capture_output=True,
                              check=False, timeout=TIMEOUT_S)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def until_committed(self, slots):
        """Asks again and again, also while it does not serve yet."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            sets = self.cowctl("results")
            if sets and sets[0]["committed"] >= slots:
                return
            if sets == [] and slots > 0:  # done
                return
        raise AssertionError(f"{slots} slots are not committed")

    def close(self):
        if self.process.poll() is None:
            while self.cowctl("shutdown", "--purge") is None:
                pass
        self.process.wait(TIMEOUT_S)
        for file in glob.glob(f"{self.socket}*"):
            os.unlink(file)


class KnnDemoTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="knn-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.environment = {}
        self.temporary = self.folder / "t"
        self.temporary.mkdir()

    def start(self, *flags):
        demo = Demo(self.temporary, *flags)
        self.addCleanup(demo.close)
        return demo

    def run_demo(self, *flags, code=0):
        done = subprocess.run([BIN / "knn-demo", *flags], capture_output=True, timeout=TIMEOUT_S, check=False,
                              env=os.environ | {"XDG_RUNTIME_DIR": str(self.temporary)} | self.environment)
        self.assertEqual(done.returncode, code, done)
        return done.stdout.decode(), done.stderr.decode()

    def report_of(self, demo, *, k, rows, lost=0):
        """The JSON that a run wrote, after it was checked for what holds for every run."""
        report = json.loads((self.folder / "report.json").read_text())
        kinds = {"accuracy": float, "k": int, "test_rows": int, "correct": int, "workers": int, "seconds": float,
                 "train_bytes": int, "pss_sum_bytes": int, "pss_bytes_by_worker": list, "lost_workers": int}
        self.assertEqual({key: type(report.get(key)) for key in kinds}, kinds)
        self.assertEqual((report["k"], report["test_rows"], report["lost_workers"]), (k, rows, lost), demo)
        self.assertEqual(report["accuracy"], report["correct"] / rows)
        self.assertEqual(report["train_bytes"], TRAIN_BYTES)
        self.assertGreater(report["seconds"], 0)
        by_worker = report["pss_bytes_by_worker"]
        self.assertEqual([type(size) for size in by_worker], [int] * (report["workers"] - lost))
        self.assertEqual(report["pss_sum_bytes"], sum(by_worker))
        if counts_memory_alone():
            self.assertLess(report["pss_sum_bytes"], 2 * TRAIN_BYTES)
        self.assertGreater(report["pss_sum_bytes"], TRAIN_BYTES)  # they do have all of it mapped
        return report

    def outputs(self):
        return "--json", str(self.folder / "report.json"), "--predictions", str(self.folder / "predictions.npy")

    def predictions(self, rows):
        predictions = np.load(self.folder / "predictions.npy")
        self.assertEqual((predictions.dtype, predictions.shape), (np.uint8, (rows,)))
        return predictions

    def assert_right(self, report, *, k, rows):
        predictions = self.predictions(rows)
        compared = min(rows, ORACLE_ROWS)
        np.testing.assert_array_equal(predictions[:compared], oracle(k)[:compared])
        labels = knn_oracle.read_idx(DATA / "t10k-labels-idx1-ubyte.gz")[:rows]
        self.assertEqual(report["correct"], np.count_nonzero(predictions == labels))

    def assert_clean(self, demo):
        """Nothing is left: no process, no shared memory, no file."""
        for pid in demo.pidfds:
            self.assertTrue(demo.has_ended(pid, TIMEOUT_S), f"process {pid} still runs")
        self.assertEqual(glob.glob(f"/dev/shm/cowmgr.embedded-{demo.process.pid}-*"), [])
        self.assertEqual(list(self.temporary.iterdir()), [])

    def cowctl(self, demo, *args):
        done = subprocess.run([BIN / "cowctl", "--socket", demo.socket, *args], capture_output=True, check=False,
                              timeout=TIMEOUT_S)
        self.assertEqual((done.returncode, done.stderr), (0, b""), done)
        return done.stdout.decode()

    def until_leased(self, demo, worker):
        """Asks the daemon again and again: nobody tells us when a worker has begun."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            clients = json.loads(self.cowctl(demo, "clients", "--json"))
            if any(client["pid"] == worker and client["leases"] > 0 for client in clients):
                return
        self.fail(f"worker {worker} leases nothing")

    # ---- Answers

    def test_all_of_the_test_set(self):
        demo = self.start("--workers", str(WORKERS), *self.outputs())
        self.assertEqual(demo.wait(), 0, demo.error_text())
        self.assertNotIn("knn-", demo.error_text())
        self.assert_clean(demo)
        report = self.report_of(demo, k=5, rows=TEST_ROWS)
        self.assertEqual((report["workers"], report["correct"]), (WORKERS, CORRECT))
        self.assert_right(report, k=5, rows=TEST_ROWS)
        self.assertRegex(demo.output, rf"85\.54 %: {CORRECT} of {TEST_ROWS} test images")
        self.assertRegex(demo.output, "4 copies would take 718 MiB")
        for worker in demo.workers:
            self.assertRegex(demo.output, rf"(?m)^process {worker} +\d+ +\d.* MiB +\d.* MiB +\d.* MiB$")

    def test_one_neighbour(self):
        demo = self.start("--k", "1", "--test-rows", "500", "--slots", "7", *self.outputs())
        self.assertEqual(demo.wait(), 0, demo.error_text())
        self.assert_right(self.report_of(demo, k=1, rows=500), k=1, rows=500)
        self.assert_clean(demo)

    def test_more_workers_than_slots(self):
        demo = self.start("--workers", "3", "--test-rows", "2", "--slots", "1", *self.outputs())
        self.assertEqual(demo.wait(), 0, demo.error_text())
        self.assert_right(self.report_of(demo, k=5, rows=2), k=5, rows=2)
        self.assert_clean(demo)

    def test_without_a_reader(self):
        """The report has nobody who reads it; the run is as good as any."""
        demo = self.start("--test-rows", "100", "--workers", "2", *self.outputs())
        demo.process.stdout.close()
        self.assertEqual(demo.process.wait(TIMEOUT_S), 0, demo.error_text())
        self.assert_right(self.report_of(demo, k=5, rows=100), k=5, rows=100)
        self.assert_clean(demo)

    def test_keep(self):
        demo = self.start("--keep", "--test-rows", "300", "--workers", "2", *self.outputs())
        self.assertEqual(demo.wait(), 0, demo.error_text())
        self.assertFalse(demo.has_ended(demo.daemon))
        list_command, stop_command = re.findall(r"^  (COWMGR_SOCKET=\S+ \S+cowctl \w+)  ", demo.output, re.MULTILINE)
        self.assertIn(demo.socket, list_command)
        listed = subprocess.run(["sh", "-c", f"{list_command} --json"], capture_output=True, check=True)
        self.assertEqual({array["name"] for array in json.loads(listed.stdout)}, ARRAYS)
        self.cowctl(demo, "get", "fashion-mnist/test/predictions", f"{self.folder}/kept.npy")
        np.testing.assert_array_equal(np.load(self.folder / "kept.npy"), self.predictions(300))
        subprocess.run(["sh", "-c", stop_command], check=True, stdout=subprocess.DEVNULL)
        self.assertTrue(demo.has_ended(demo.daemon, TIMEOUT_S))
        self.assertEqual(glob.glob(f"/dev/shm/cowmgr.embedded-{demo.process.pid}-*"), [])

    # ---- Deaths

    def test_a_worker_is_killed(self):
        demo = self.start("--workers", str(WORKERS), "--test-rows", "3000", *self.outputs())
        victim = demo.workers[0]
        self.until_leased(demo, victim)
        os.kill(victim, signal.SIGKILL)
        self.assertEqual(demo.wait(), 0, demo.error_text())
        self.assertRegex(demo.error_text(), rf"worker {victim} was killed by signal 9 .*; 3 of 4 are left\n")
        self.assert_right(self.report_of(demo, k=5, rows=3000, lost=1), k=5, rows=3000)
        self.assert_clean(demo)

    def test_all_workers_are_killed(self):
        demo = self.start("--workers", "2", *self.outputs())
        for worker in demo.workers:
            os.kill(worker, signal.SIGKILL)
        self.assertEqual(demo.wait(), 1)
        self.assertRegex(demo.error_text(), r"(?m)^knn-demo: none of the 2 workers is left; .* killed by signal 9")
        self.assertFalse((self.folder / "report.json").exists())
        self.assert_clean(demo)

    def test_the_daemon_is_killed(self):
        demo = self.start("--workers", "2")
        os.kill(demo.daemon, signal.SIGKILL)
        self.assertEqual(demo.wait(), 1)
        self.assertRegex(demo.error_text(), r"(?m)^knn-demo: cowmgr was killed by signal 9")
        self.assert_clean(demo)

    def test_the_daemon_of_others_is_killed_again_and_again(self):
        rows, slots, deaths = 4000, 80, 6
        daemon = OtherDaemon(self.temporary)
        self.addCleanup(daemon.close)
        demo = self.start("--socket", daemon.socket, "--workers", "3", "--test-rows", str(rows), "--slots", str(slots),
                          *self.outputs())
        for death in range(deaths):
            daemon.until_committed(slots * death // deaths)
            daemon.kill_and_start()
        self.assertEqual(demo.wait(), 0, demo.error_text())
        self.assertEqual(demo.error_text(), "")
        self.assert_right(self.report_of(demo, k=5, rows=rows), k=5, rows=rows)
        while daemon.cowctl("ping") is None:  # the last one does not serve yet
            pass
        self.assertEqual(daemon.cowctl("ls"), [], "the demo takes its arrays away")
        self.assertEqual(daemon.cowctl("results"), [])
        daemon.close()
        self.assert_clean(demo)

    def test_arrays_of_others_stay(self):
        daemon = OtherDaemon(self.temporary)
        self.addCleanup(daemon.close)
        np.save(self.folder / "theirs.npy", np.arange(3))
        daemon.cowctl("put", f"{self.folder}/theirs.npy", "--name", "fashion-mnist/test/images")
        done = subprocess.run([BIN / "knn-demo", "--socket", daemon.socket], capture_output=True, check=False,
                              timeout=TIMEOUT_S)
        self.assertEqual(done.returncode, 1, done)
        self.assertRegex(done.stderr.decode(), r"\Aknn-demo: array .fashion-mnist/test/images. exists; [^\n]+\n\Z")
        self.assertEqual([array["name"] for array in daemon.cowctl("ls")], ["fashion-mnist/test/images"])

    def test_signals(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            for keep in ([], ["--keep"]):
                with self.subTest(signal=number, keep=keep):
                    demo = self.start("--workers", "2", *keep, *self.outputs())
                    self.until_leased(demo, demo.workers[1])
                    demo.process.send_signal(number)
                    self.assertEqual(demo.wait(), -number)
                    self.assertRegex(demo.error_text(), r"(?m)^knn-demo: interrupted\n\Z")
                    self.assertNotIn("worker", demo.error_text())
                    self.assertFalse((self.folder / "report.json").exists())
                    self.assert_clean(demo)

    def test_the_demo_is_killed(self):
        demo = self.start("--workers", "2")
        self.until_leased(demo, demo.workers[0])
        demo.process.kill()
        demo.process.wait()
        self.assert_clean(demo)

    def test_the_demo_is_killed_while_the_daemon_does_not_answer(self):
        daemon = OtherDaemon(self.temporary)
        self.addCleanup(daemon.close)
        demo = self.start("--socket", daemon.socket, "--workers", "2")
        self.addCleanup(daemon.process.send_signal, signal.SIGCONT)
        daemon.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED)
        demo.process.kill()
        demo.process.wait()
        for worker in demo.workers:
            self.assertTrue(demo.has_ended(worker, TIMEOUT_S), f"worker {worker} still runs")

    # ---- Refusals

    def refuse(self, *flags, code, says):
        output, errors = self.run_demo(*flags, code=code)
        self.assertEqual(output, "")
        self.assertRegex(errors, rf"\Aknn-demo: [^\n]*{says}[^\n]*\n\Z")
        self.assertEqual(list(self.temporary.iterdir()), [])

    def test_wrong_usage(self):
        for flags in (["--k", "0"], ["--k", "-1"], ["--workers", "0"], ["--workers", "x"], ["--workers", "257"],
                      ["--slots", "0"], ["--test-rows", "0"], ["--data", "/nonexistent"], ["--nonsense"], ["more"],
                      ["--json"], ["--keep", "--socket", "s"]):
            with self.subTest(flags):
                self.refuse(*flags, code=2, says="; see `knn-demo --help`")

    def test_what_the_data_do_not_allow(self):
        self.refuse("--k", "60001", code=1, says="--k 60001 is too much: there are 60000 training images")
        self.refuse("--test-rows", "10001", code=1, says="--test-rows 10001 is too much: there are 10000 test images")
        self.refuse("--test-rows", "5", "--slots", "6", code=1, says="--slots 6 is too much: there are 5 test images")
        self.refuse("--data", str(self.folder), code=1, says="train-images-idx3-ubyte.gz")

    def test_files_that_cannot_be_written(self):
        self.refuse("--json", f"{self.folder}/missing/report.json", code=1, says="missing")
        self.refuse("--predictions", str(self.folder), code=1, says="is a directory")

    def test_no_room(self):
        self.environment = {"COWMGR_CAPACITY": "100MiB"}
        self.refuse(code=1, says="needs 179 MiB; .* with a larger --capacity")

    def test_the_daemon_does_not_start(self):
        self.environment = {"COWMGR_CAPACITY": "nonsense"}
        for flags in [], ["--keep"]:
            _, errors = self.run_demo(*flags, code=1)
            self.assertRegex(errors, r'"nonsense" is not a size')
            self.assertRegex(errors, r"(?m)^knn-demo: cowmgr ended with exit status 2; .*\n\Z")
            self.assertEqual(list(self.temporary.iterdir()), [])

    def test_help(self):
        output, errors = self.run_demo("--help")
        self.assertEqual(errors, "")
        for option in ("--workers", "--k", "--slots", "--test-rows", "--data", "--json", "--predictions", "--keep",
                       "--socket"):
            self.assertIn(option, output)

    def test_worker_usage(self):
        for arguments in ([], ["x"], ["1", "2"], ["-1"], ["5x"]):
            done = subprocess.run([BIN / "knn-worker", *arguments], capture_output=True, check=False)
            self.assertEqual((done.returncode, done.stderr), (2, b"usage: knn-worker K\n"), arguments)

    def test_worker_without_daemon(self):
        done = subprocess.run([BIN / "knn-worker", "5"], stdin=subprocess.DEVNULL, capture_output=True, check=False,
                              env=os.environ | {"COWMGR_SOCKET": f"{self.folder}/none.sock"})
        self.assertEqual((done.returncode, done.stdout), (1, b""))
        self.assertRegex(done.stderr, rb"\Aknn-worker \d+: [^\n]+\n\Z")


if __name__ == "__main__":
    # A shell's background job ignores SIGINT, and so would every program that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    unittest.main()
