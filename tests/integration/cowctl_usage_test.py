#!/usr/bin/env python3
"""How cowctl is called, and what it does to a terminal or a pipe. Usage: cowctl_usage_test.py BIN_DIR"""

import os
import pty
import socket
import subprocess
import unittest

import numpy as np
from cowctl_fixture import MIB, TIMEOUT_S, CowctlTest


class Terminal(CowctlTest):
    def on_terminal(self, *args, stream="stdout", **env):
        terminal, slave = pty.openpty()
        process = self.start(*args, env=self.env(**env), **({"stdout": subprocess.DEVNULL} | {stream: slave}))
        os.close(slave)
        out = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # EIO: the other end is closed
                part = b""
            if not part:
                break
            out += part
        os.close(terminal)
        self.assertEqual(process.wait(TIMEOUT_S), 0)
        return out

    def test_colour_on_a_terminal_alone(self):
        self.put("x", np.arange(3))
        self.assertIn(b"\033[1mNAME", self.on_terminal("ls"))
        self.assertNotIn(b"\033", self.on_terminal("ls", "--json"))
        self.assertNotIn(b"\033", self.on_terminal("ls", NO_COLOR="1"))
        self.assertNotIn(b"\033", self.on_terminal("ls", TERM="dumb"))
        self.assertNotIn("\033", self.run_text("ls"))

    def test_progress_on_a_terminal_alone(self):
        path = self.save("x", np.arange(MIB))
        bar = self.on_terminal("put", path, stream="stderr")
        self.assertRegex(bar, rb"put x +100%  \[#+\]  8 MiB of 8 MiB")
        self.assertRegex(self.on_terminal("get", "x", "y.npy", stream="stderr"), rb"get x +100%")
        self.assertEqual(self.on_terminal("get", "x", "y.npy", "--force", "--json", stream="stderr"), b"")
        self.run_text("get", "x", "z.npy")  # nothing on a standard error that is none

    def test_a_reader_that_has_seen_enough(self):
        self.put("x", np.arange(3))
        for ignores in (False, True):
            reader, writer = os.pipe()
            os.close(reader)
            process = self.start("ls", stdout=writer, stderr=subprocess.PIPE, restore_signals=not ignores)
            os.close(writer)
            self.assertEqual(process.communicate(timeout=TIMEOUT_S)[1], b"")
            self.assertEqual(process.returncode, 0)

    def test_output_that_cannot_be_written(self):
        with open("/dev/full", "wb") as full:
            process = self.start("stat", stdout=full, stderr=subprocess.PIPE)
            message = process.communicate(timeout=TIMEOUT_S)[1]
        self.assertEqual(process.returncode, 1)
        self.assertIn(b"standard output: No space left", message)

    def test_closed_output(self):
        """The socket must not become standard output."""
        process = self.start("stat", stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
        self.assertIn(b"standard output: Bad file descriptor", process.communicate(timeout=TIMEOUT_S)[1])
        self.assertEqual(process.returncode, 1)


class Usage(CowctlTest):
    """Wrong usage and help need no daemon; there is none here."""

    def setUp(self):
        self.make_folder()

    def env(self, **extra):
        return os.environ | {"COWMGR_SOCKET": f"{self.folder}/none.sock"} | extra

    def test_wrong_usage(self):
        for args in ([], ["bogus"], ["ls", "a", "b"], ["ls", "--bogus"], ["stat", "a", "b"], ["put"], ["put", "a", "b"],
                     ["put", "x", "--mode", "999"], ["put", "x", "--mode", "1777"], ["put", "x", "--mode", ""],
                     ["put", "x", "--name"], ["get"], ["get", "x"], ["get", "a", "b", "c"], ["evict"], ["pin"], ["unpin"],
                     ["evict", "a", "--lru", "1G"], ["evict", "--lru"], ["evict", "--lru", "0"], ["evict", "--lru", "much"],
                     ["evict", "--lru", "-5"], ["evict", "--lru", "1e30T"], ["clients", "x"], ["ping", "x"], ["ls", "--socket"],
                     ["\x1b[31m"], ["ls", "a", "\x1b[31m"], [b"\xff"], ["", "ls"], ["LS"]):
            with self.subTest(args=args):
                self.refuse("invalid_argument", *args, code=2, says="cowctl (\\w+ )?--help")

    def test_no_daemon(self):
        np.save(self.folder / "x.npy", np.arange(3))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(f"{self.folder}/dead.sock")
        for args in (["ls"], ["stat"], ["stat", "x"], ["put", "x.npy"], ["get", "x", "y.npy"], ["evict", "x"], ["pin", "x"],
                     ["evict", "--lru", "1G"], ["unpin", "x"], ["clients"], ["results"], ["ping"], ["shutdown"]):
            with self.subTest(args=args):
                self.refuse("no_daemon", *args, code=3, says="none.sock")
        self.refuse("no_daemon", "ls", "--socket", "dead.sock", code=3, says="dead.sock")
        self.refuse("no_daemon", "ls", "--socket", "x.npy", code=3)
        self.assertFalse((self.folder / "y.npy").exists())

    def test_help(self):
        text = self.run_text("--help")
        commands = "ls stat put get evict pin unpin clients results ping shutdown fsck".split()
        for command in commands:
            self.assertRegex(text, rf"\n  cowctl {command}\b")
            example = self.run_text(command, "--help")
            self.assertIn(f"Example:\n  cowctl {command}", example)
        self.assertIn("COWMGR_SOCKET", text)
        self.assertEqual(self.run_text("--version"), "cowctl 0.1.0\n")


if __name__ == "__main__":
    unittest.main()
