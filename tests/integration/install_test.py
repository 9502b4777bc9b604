"""Installs the build, and builds and runs a program outside this project against what was installed.

Usage: install_test.py BUILD_DIR
"""

import os
import pathlib
import subprocess
import sys
import tempfile


def run(*command, **options):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def main():
    build = pathlib.Path(sys.argv[1])
    source = pathlib.Path(__file__).parent / "consumer"
    with tempfile.TemporaryDirectory() as scratch:
        prefix = pathlib.Path(scratch) / "prefix"
        binary = pathlib.Path(scratch) / "consumer"
        run("cmake", "--install", build, "--prefix", prefix)
        for program in ("cowmgr", "cowctl"):
            run(prefix / "bin" / program, "--version")
        run("cmake", "-S", source, "-B", binary, f"-DCMAKE_PREFIX_PATH={prefix}")
        run("cmake", "--build", binary)
        environment = dict(os.environ, COWMGR_DAEMON=str(prefix / "bin" / "cowmgr"))
        said = run(binary / "consumer", env=environment)
        if said.strip() != "3":
            sys.exit(f"the consumer said {said!r}, not 3")


main()
