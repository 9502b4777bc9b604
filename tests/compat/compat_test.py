"""Programs, segments and result sets of two versions, each against the other.

Usage: compat_test.py OLD_DIR NEW_DIR [UNITTEST ARGS]; each holds cowmgr, cowctl and driver (driver.cpp) of one version.
"""

import functools
import glob
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from programs import TIMEOUT_S, start_daemon  # noqa: E402  (found by the line above)

VERSIONS = {}  # "old" and "new", the directories; set by main
BOTH = ("old", "new")
PAIRS = tuple(itertools.product(BOTH, BOTH))
CHANGES = (("old", "new"), ("new", "old"))  # a daemon, and the one that follows it
ITEMS = 100_000
COUNTER = itertools.count(1)


class Daemon:
    """An instance, and the daemon that serves it just now: one of either version."""

    def __init__(self, test, version):
        folder = tempfile.TemporaryDirectory(prefix="compat-")
        test.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.instance = f"compat-{os.getpid()}-{next(COUNTER)}"
        self.socket = f"{self.folder}/s.sock"
        self.process = None
        test.addCleanup(self.remove)
        self.start(version)

    def command(self, version, socket_path):
        return [VERSIONS[version] / "cowmgr", "--socket", socket_path, "--instance", self.instance, "--capacity", "256MiB",
                "--grace", "60", "--log-level", "error"]

    def start(self, version):
        self.process = start_daemon(self.command(version, self.socket), self.folder)

    def change(self, version, how=signal.SIGTERM):
        self.stop(how)
        self.start(version)

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(TIMEOUT_S)

    def remove(self):
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
        for file in self.segments():
            os.unlink(file)

    def segments(self):
        return glob.glob(f"/dev/shm/cowmgr.{self.instance}.*")

    def cowctl(self, version, *arguments):
        done = subprocess.run([VERSIONS[version] / "cowctl", *arguments], env=os.environ | {"COWMGR_SOCKET": self.socket},
                              text=True, check=False, timeout=TIMEOUT_S, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode != 0:
            raise AssertionError(f"{version} cowctl {arguments}: {done.returncode}\n{done.stderr}")
        return done.stdout

    def names(self, version):
        """Of the arrays that are served."""
        arrays = json.loads(self.cowctl(version, "ls", "--json"))
        return sorted(array["name"] for array in arrays if array["state"] == "sealed")


class Client:
    """The driver of one version. Each word list is a line for it, which it must answer with "ok"."""

    def __init__(self, test, daemon, version):
        self.version = version
        self.process = subprocess.Popen([VERSIONS[version] / "driver"], env=os.environ | {"COWMGR_SOCKET": daemon.socket},
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        test.addCleanup(self.end)

    def ask(self, *words):
        print(*words, file=self.process.stdin, flush=True)

    def answer(self, *words):
        said = self.process.stdout.readline().strip()
        if said != "ok":
            raise AssertionError(f"{self.version} driver{words}: {said or self.process.wait(TIMEOUT_S)}")

    def does(self, *words):
        self.ask(*words)
        self.answer(*words)

    def end(self):
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()


def for_each(cases):
    """A test that is made with the versions of each case."""
    def decorate(test):
        @functools.wraps(test)
        def tests(self):
            for case in cases:
                with self.subTest(" ".join(case)):
                    test(self, *case)
        return tests
    return decorate


class Compat(unittest.TestCase):
    @for_each(PAIRS)
    def test_a_client_and_a_daemon_of_any_two_versions(self, client_of, daemon_of):
        daemon = Daemon(self, daemon_of)
        client = Client(self, daemon, client_of)
        client.does("put", "a", ITEMS)
        client.does("view", "a", ITEMS)
        client.does("ask", "a")
        client.does("create", "b", ITEMS)
        client.does("seal")
        client.does("dense", "d", ITEMS, 16)
        client.does("work")
        client.does("collect", "d", ITEMS)
        client.does("ragged", "r", 16)
        client.does("work")
        client.does("collect", "r")
        client.does("start-pool")
        client.does("pool", "a")
        client.does("evict", "a")
        client.does("look", "a", ITEMS)
        self.assertEqual(daemon.names(client_of), ["b", "d"])

    @for_each(PAIRS)
    def test_workers_of_both_versions_fill_one_set(self, maker_of, daemon_of):
        daemon = Daemon(self, daemon_of)
        maker = Client(self, daemon, maker_of)
        workers = [Client(self, daemon, version) for version in BOTH]
        for make in (("dense", "set", ITEMS, 64), ("ragged", "set2", 64)):
            maker.does(*make)
            for worker in workers:
                worker.does("open", make[1])
                worker.does("lease")
            for worker in workers:
                worker.ask("commit")
                worker.ask("work")
            for worker in workers:
                worker.answer("commit")
                worker.answer("work")
            maker.does("collect", make[1], ITEMS)

    @for_each(CHANGES)
    def test_what_clients_have_goes_on_when_the_other_daemon_follows(self, before, after):
        for how in (signal.SIGTERM, signal.SIGKILL):
            daemon = Daemon(self, before)
            reader, writer, maker, worker, pool = clients = [Client(self, daemon, version)
                                                             for version in ("old", "new", "old", "new", before)]
            reader.does("put", "a", ITEMS)
            reader.does("view", "a", ITEMS)
            writer.does("create", "b", ITEMS)
            maker.does("dense", "d", ITEMS, 16)
            worker.does("open", "d")
            worker.does("lease")
            pool.does("start-pool")
            daemon.change(after, how)
            reader.does("look", "a", ITEMS)
            writer.does("seal")
            reader.does("view", "b", ITEMS)
            worker.does("commit")
            worker.does("work")
            maker.does("collect", "d", ITEMS)
            pool.does("pool", "a")
            for client in clients:
                client.does("put", "c", ITEMS)

    @for_each(CHANGES)
    def test_sets_that_run_go_on_there_and_back(self, before, after):
        daemon = Daemon(self, before)
        maker, worker = (Client(self, daemon, version) for version in (after, before))
        maker.does("ragged", "r", 24)
        worker.does("open", "r")
        for version in (after, before, after):
            worker.does("lease")
            worker.does("commit")
            worker.does("lease")
            daemon.change(version, signal.SIGKILL)
            worker.does("commit")
        worker.does("work")
        maker.does("collect", "r")

    @for_each(CHANGES)
    def test_each_serves_the_arrays_that_the_other_left(self, before, after):
        daemon = Daemon(self, before)
        client = Client(self, daemon, before)
        client.does("put", "a", ITEMS)
        client.does("put", "a", ITEMS // 2)
        client.does("put", "b", ITEMS)
        client.does("evict", "b")
        daemon.cowctl(before, "pin", "a")
        daemon.change(after)
        later = Client(self, daemon, after)
        later.does("view", "a", ITEMS // 2)
        self.assertEqual(daemon.names(after), ["a"])
        told = json.loads(daemon.cowctl(after, "stat", "a", "--json"))
        self.assertTrue(told["pinned"], told)
        later.does("ask", "a")

    @for_each(PAIRS)
    def test_cowctl_of_any_version(self, tool, daemon_of):
        daemon = Daemon(self, daemon_of)
        source = f"{daemon.folder}/source.npy"
        target = f"{daemon.folder}/target.npy"
        np.save(source, np.arange(ITEMS).reshape(100, -1))
        daemon.cowctl(tool, "put", source, "--name", "a", "--checksum")
        daemon.cowctl(tool, "get", "a", target)
        self.assertTrue((np.load(source) == np.load(target)).all())
        for command in ("verify a", "pin a", "unpin a", "stat a", "ls", "clients", "results", "ping", "fsck", "evict a"):
            daemon.cowctl(tool, *command.split())
        daemon.cowctl(tool, "shutdown", "--purge")
        self.assertEqual(daemon.process.wait(TIMEOUT_S), 0)

    @for_each(CHANGES)
    def test_two_daemons_of_any_versions_never_serve_one_instance(self, first, second):
        daemon = Daemon(self, first)
        other = daemon.command(second, f"{daemon.folder}/other.sock")
        done = subprocess.run(other, check=False, timeout=TIMEOUT_S, stderr=subprocess.DEVNULL)
        self.assertNotEqual(done.returncode, 0)
        Client(self, daemon, second).does("put", "a", ITEMS)

    # The last release takes a newer layout for damage: it moves the segment aside, and what it holds stays.
    def test_the_old_daemon_loses_nothing_that_it_does_not_know(self):
        daemon = Daemon(self, "new")
        dtype = np.dtype([(f"a field with a long name, number {i:04}", "<f8") for i in range(120)])
        np.save(f"{daemon.folder}/wide.npy", np.zeros(3, dtype))
        daemon.cowctl("new", "put", f"{daemon.folder}/wide.npy", "--name", "wide")

        def contents():
            return {hashlib.sha256(Path(file).read_bytes()).digest()
                    for file in daemon.segments() if not file.endswith(".lock")}

        left = contents()
        self.assertTrue(left)
        daemon.change("old")
        Client(self, daemon, "old").does("put", "a", ITEMS)
        self.assertLessEqual(left, contents())
        daemon.change("new")
        self.assertEqual(daemon.names("new"), ["a"])
        self.assertLessEqual(left, contents())


if __name__ == "__main__":
    VERSIONS.update(old=Path(sys.argv.pop(1)), new=Path(sys.argv.pop(1)))
    unittest.main()
