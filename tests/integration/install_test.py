"""Builds and runs a program outside this project, in both ways that the README names: against what was installed, and
with this project as a directory of its own.

Usage: install_test.py BUILD_DIR SOURCE_DIR
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

# Where the headers of other projects that ours include come from. find_package(cowmgr) must look for each; for those of the
# pool only where its component is asked for.
POOL_HEADERS = {"pool.hpp", "pool_task.hpp"}
PACKAGES = {"boost": "Boost", "cereal": "cereal", "tl": "tl-expected"}
OUR_OWN = {"cowmgr", "sys"}
# Nobody needs these who wants the library alone.
NOT_FOR_THE_LIBRARY = ("benchmark", "cereal", "CLI11", "GTest", "nlohmann_json", "PkgConfig", "spdlog")

build = pathlib.Path(sys.argv[1])
project = pathlib.Path(sys.argv[2])
scratch = build / "install_test"  # the same each time, so that ccache knows the files again
prefix = scratch / "prefix"


def attempt(*command, **options):
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options)


def run(*command, **options):
    done = attempt(*command, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def check(holds, complaint):
    if not holds:
        sys.exit(complaint)


def configure(binary, *definitions):
    launcher = shutil.which("ccache")
    cached = [f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}"] if launcher else []
    return ("cmake", "-G", "Ninja", "-S", project / "tests/integration/consumer", "-B", binary, *cached, *definitions)


def disabled(package):
    return f"-DCMAKE_DISABLE_FIND_PACKAGE_{package}=ON"


def consume(binary, *definitions):
    """The consumer asks for no C++ standard: the library's target must."""
    run(*configure(binary, *definitions))
    run("cmake", "--build", binary)
    check_said(binary / "consumer", "3")


def check_said(program, expected):
    said = run(program, env=dict(os.environ, COWMGR_DAEMON=str(build / "bin" / "cowmgr")))
    check(said.strip() == expected, f"{program.name} said {said!r}, not {expected}")


def included_packages(of_pool):
    """The projects whose headers the installed headers include: those of the pool, or the others."""
    folders = set()
    for header in (prefix / "include").rglob("*.hpp"):
        if (header.name in POOL_HEADERS) != of_pool:
            continue
        folders |= set(re.findall(r'^#include [<"]([\w-]+)/', header.read_text(), re.MULTILINE))
    unknown = folders - OUR_OWN - PACKAGES.keys()
    check(not unknown, f"an installed header includes <{unknown}/...>: say here and in cowmgr-config.cmake.in whose it is")
    return {PACKAGES[folder] for folder in folders - OUR_OWN}


def test_installed():
    run("cmake", "--install", build, "--prefix", prefix)
    for program in ("cowmgr", "cowctl"):
        run(prefix / "bin" / program, "--version")
    consume(scratch / "installed", f"-DCMAKE_PREFIX_PATH={prefix}", *map(disabled, sorted(included_packages(of_pool=True))))


def test_installed_pool():
    binary = scratch / "installed_pool"
    consume(binary, f"-DCMAKE_PREFIX_PATH={prefix}", "-DUSES_POOL=ON")
    check_said(binary / "pool_consumer", "42")


def test_headers_stand_alone():
    """Each installed header compiles by itself, with nothing of the source tree in reach."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    for header in sorted((prefix / "include").rglob("*.hpp")):
        run(compiler, "-std=c++20", "-fsyntax-only", "-I", prefix / "include", "-x", "c++", header)


def test_installed_names_what_is_missing():
    check(included_packages(of_pool=False) == {"tl-expected"}, f"public headers need {included_packages(of_pool=False)}")
    for of_pool, options in ((False, ()), (True, ("-DUSES_POOL=ON",))):
        for package in sorted(included_packages(of_pool)):
            binary = scratch / "incomplete"
            shutil.rmtree(binary, ignore_errors=True)
            done = attempt(*configure(binary, f"-DCMAKE_PREFIX_PATH={prefix}", disabled(package), *options))
            check(done.returncode != 0 and package in done.stdout,
                  f"find_package(cowmgr) does not look for {package}:\n{done.stdout}")


def test_directory_of_a_project():
    binary = scratch / "directory"
    consume(binary, f"-DCOWMGR_SOURCE_DIR={project}", *map(disabled, NOT_FOR_THE_LIBRARY))
    built = {file.name for file in binary.rglob("*") if file.suffix in (".a", ".so") or file.parent.name == "bin"}
    check(built == {"libcowmgr.a", "libcowmgr_proto.a"}, f"add_subdirectory built {sorted(built)}")


shutil.rmtree(scratch, ignore_errors=True)
test_installed()
test_installed_pool()
test_headers_stand_alone()
test_installed_names_what_is_missing()
test_directory_of_a_project()
