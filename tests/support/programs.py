"""The programs of a build, as tests in Python start them."""

import os
import select
import socket
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 240  # a sanitizer on a busy machine


def bin_directory():
    """The first argument of the test: where the programs lie. The others are for unittest."""
    if len(sys.argv) < 2 or not os.access(f"{sys.argv[1]}/cowmgr", os.X_OK):
        sys.exit(f"usage: {Path(sys.argv[0]).name} BIN_DIR [UNITTEST ARGS]")
    return Path(sys.argv.pop(1)).resolve()


def start_daemon(command, folder, env=None):
    """A daemon that serves when this returns. It says so at a socket in `folder`."""
    notify = f"{folder}/notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(notify)
        process = subprocess.Popen(command, env=(env or os.environ) | {"NOTIFY_SOCKET": notify})
        pidfd = os.pidfd_open(process.pid)
        try:
            readable, _, _ = select.select([ready, pidfd], [], [], TIMEOUT_S)
            if ready not in readable or b"READY=1" not in ready.recv(4096):
                process.kill()
                process.wait()
                raise AssertionError(f"the daemon did not start: {process.returncode}")
        finally:
            os.close(pidfd)
    os.unlink(notify)
    return process
