"""What ./dev installs, and what it builds for the demo, on machines that are not this one.

The package managers are stand-ins that say what a release has; cmake is one too where it would only cost time.
Usage: dev_test.py SOURCE_DIR
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

PROJECT = pathlib.Path(sys.argv.pop(1))
TOOLS = "awk bash cat comm cut dirname env grep id nproc readlink rm sed sort tr xargs".split()

# Each writes down how it was called. A package has a candidate if the file `has` names it; none is installed.
APT_GET = 'echo "apt-get $*" >>"$MACHINE/calls"'
DPKG_QUERY = "exit 1"
APT_CACHE = """
shift
for name; do
  echo "$name:"
  if grep -qx "$name" "$MACHINE/has"; then echo "  Candidate: 1.0"; else echo "  Candidate: (none)"; fi
done"""
CMAKE = 'echo "cmake $*" >>"$MACHINE/calls"'

COMMON = """build-essential cmake ninja-build ccache pkg-config libfmt-dev libspdlog-dev libexpected-dev libflatbuffers-dev
flatbuffers-compiler libcereal-dev libcli11-dev nlohmann-json3-dev libsystemd-dev libxxhash-dev zlib1g-dev
libopenblas-dev dataset-fashion-mnist libgtest-dev libgmock-dev libbenchmark-dev spin python3-minimal python3-numpy
git""".split()
DEBIAN_12 = [*COMMON, "libboost1.81-dev", "clang-16", "libclang-rt-16-dev", "clang-format-16", "clang-tidy-16"]
DEBIAN_13 = [*COMMON, "libboost1.83-dev", "clang-19", "libclang-rt-19-dev"]
ONLY_FOR_TESTS = {"libgtest-dev", "libgmock-dev", "libbenchmark-dev", "spin", "python3-minimal", "python3-numpy"}


class Machine:
    """A clone of the project, and a PATH with nothing else on it but TOOLS and the stand-ins."""

    def __init__(self, test, **stand_ins):
        scratch = tempfile.TemporaryDirectory()
        test.addCleanup(scratch.cleanup)
        self.path = pathlib.Path(scratch.name)
        self.dev = self.path / "project" / "dev"
        self.dev.parent.mkdir()
        shutil.copy(PROJECT / "dev", self.dev)
        self.bin = self.path / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        for name, text in stand_ins.items():
            self.add(name.replace("_", "-"), text)

    def add(self, name, text):
        program = self.bin / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)

    def run(self, *arguments):
        environment = {"PATH": str(self.bin), "MACHINE": str(self.path), "HOME": str(self.path)}
        return subprocess.run([self.dev, *arguments], env=environment, text=True, check=False,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def calls(self, program):
        lines = (self.path / "calls").read_text().splitlines()
        return [line.split()[1:] for line in lines if line.split()[0] == program]

    def installed(self):
        (install,) = [call for call in self.calls("apt-get") if "install" in call]
        return set(install[install.index("--no-install-recommends") + 1:])


def debian(test, packages):
    machine = Machine(test, apt_get=APT_GET, apt_cache=APT_CACHE, dpkg_query=DPKG_QUERY, cmake=CMAKE, sudo='exec "$@"')
    (machine.path / "has").write_text("\n".join(packages))
    return machine


class Dev(unittest.TestCase):
    def test_each_release_gets_its_own_packages(self):
        for release in (DEBIAN_12, DEBIAN_13):
            machine = debian(self, release)
            done = machine.run("deps")
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertEqual(machine.installed(), {name for name in release if "clang" not in name and name != "git"})

    def test_lint_names_the_tools_that_a_release_does_not_have(self):
        done = debian(self, DEBIAN_13).run("lint")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"(?m)^ *clang-format-16: other versions format differently")

    def test_what_a_release_does_not_have_is_named_and_nothing_is_installed(self):
        machine = debian(self, [name for name in DEBIAN_13 if name != "libboost1.83-dev"])
        done = machine.run("deps")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"do not have all that it takes.*\n.* libboost1.81-dev or libboost1.83-dev: Asio")
        self.assertNotIn("libfmt-dev", done.stdout)
        self.assertNotIn("install", str(machine.calls("apt-get")))

    def test_without_apt_get_what_is_missing_is_named_and_what_is_there_is_not(self):
        machine = Machine(self, cmake="", ninja="")
        done = machine.run("deps")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"(?m)^ *libfmt-dev: text of messages \(fmt/format\.h\)$")
        self.assertNotIn("cmake:", done.stdout)
        self.assertNotIn("ninja-build:", done.stdout)

    def test_without_apt_get_all_is_well_where_nothing_is_missing(self):
        machine = Machine(self)
        machine.add("c++", "exit 0")
        for program in "cmake ninja ccache pkg-config flatc spin".split():
            machine.add(program, "")
        done = machine.run("deps")
        # Data, and modules of the system's Python, are where they are: only those can be missing here.
        self.assertNotRegex(done.stdout, r"(?m)^ *(lib|build|cmake|ninja|ccache|pkg|flat|nloh|zlib|spin)")

    def test_the_demo_installs_and_builds_what_it_runs(self):
        machine = debian(self, DEBIAN_13)
        machine.run("demo")  # fails in the end: the stand-in builds nothing
        self.assertEqual(machine.installed() & ONLY_FOR_TESTS, set())
        configure, build = machine.calls("cmake")
        self.assertIn("-DCOWMGR_TESTS=OFF", configure)
        self.assertEqual(build[build.index("--target") + 1:],
                         ["bin/knn-demo", "bin/knn-worker", "bin/cowmgr", "bin/cowctl"])

    def test_what_the_demo_runs_needs_no_package_that_only_tests_need(self):
        with tempfile.TemporaryDirectory() as build:
            disabled = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("GTest", "benchmark")]
            subprocess.run(["cmake", "--no-warn-unused-cli", "-S", PROJECT, "-B", build, "-G", "Ninja", "-DCOWMGR_TESTS=OFF", "-DCOWMGR_BENCH=OFF",
                            *disabled], check=True, stdout=subprocess.DEVNULL)
            plan = subprocess.run(["ninja", "-C", build, "-n", "-v", "bin/knn-demo", "bin/knn-worker", "bin/cowmgr",
                                   "bin/cowctl"], check=True, text=True, stdout=subprocess.PIPE).stdout
        self.assertIn("knn_demo.cpp", plan)
        self.assertNotIn("tests/", plan)


if __name__ == "__main__":
    os.environ.pop("COWMGR_DEPS", None)
    unittest.main()
