#!/usr/bin/env python3
"""Includes flow one way, and shared memory has one seam. Usage: layering_test.py SOURCE_DIR

Prints each violation as `file:line: sentence` and exits with 1 if there is one.
"""

import re
import sys
from pathlib import Path

# The daemon's folders, and the files beside them, from bottom to top. A file includes what lies beside it, without
# circles, and what lies below.
DAEMON_LAYERS = ["shm", "store", "config", "core", "requests", "peers", "main"]

# The same of the files that lie in client/ itself; a name stands for name.hpp and name.cpp alone.
LIBRARY_LAYERS = [
    ["child_process", "client_access", "fork_guard", "limit", "server_check", "socket_mark"],
    ["channel", "mappings", "own_thread"],
    ["grants", "greeter", "releases", "turns", "watched_socket"],
    ["channel_pool", "holdings", "patience"],
    ["resumption"],
    ["connection"],
    ["handles"],
    ["array", "client", "embedded", "info", "result_set_impl", "results", "slot", "work"],
]

# What each part may include of this project. The longest matching folder counts; tests/ may include everything.
PARTS = {
    "proto/": ("proto/", "cowmgr/"),
    "daemon/": ("proto/", "daemon/"),
    "client/": ("proto/", "client/", "cowmgr/"),
}
# Public headers. Those in client/ are the client's own: proto/ and daemon/ do not include them.
PUBLIC_FOLDERS = ("proto/include/", "client/include/", "client/pool/include/")
# What users of the library see: the standard library, tl::expected, and each other. What is named here needs more.
PUBLIC_INCLUDE = re.compile(r"<[a-z_]+>|<sys/types\.h>|<tl/expected\.hpp>|\"cowmgr/[a-z_]+\.hpp\"")
PUBLIC_INCLUDE_OF = {
    "pool_task.hpp": re.compile(r"<cereal/[a-z_/]+\.hpp>|<boost/interprocess/streams/bufferstream\.hpp>"),
}
POOL_FOLDER = "client/pool/"
USES_POOL = (POOL_FOLDER, "client/examples/")  # of the client's files
NOT_IN_LIBRARIES = ("boost/asio", "spdlog")  # under proto/ and client/
SHM_FILE = "daemon/shm/shm_env.cpp"
SHM_CALL_ELSEWHERE = {("proto/lock_file.cpp", "ftruncate")}  # an ordinary file, which holds a process id
SHM_CALL = re.compile(
    r"\b(shm_open|shm_unlink|(?:posix_)?fallocate(?:64)?|ftruncate(?:64)?|F_SETLEASE|MADV_COLLAPSE)\b")

# The library has one mutex, which fork(2) finds unlocked: client/fork_guard.hpp. Only what is declared counts, not who locks it.
LIBRARY_MUTEX_FILES = ("client/fork_guard.hpp", "client/fork_guard.cpp")
MUTEX = re.compile(r"\bstd::(?:recursive_|shared_|timed_)*mutex\s+\w+|\bstd::(?:call_once|once_flag)\b|\bpthread_mutex_t\b")

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]', re.MULTILINE)
# Comments and literals; a quote after a hexadecimal digit separates digits (1'000).
COMMENT = re.compile(
    r'(?P<text>R"(?P<mark>[^(\s]*)\(.*?\)(?P=mark)"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])*\')'
    r"|//[^\n]*|/\*.*?\*/", re.DOTALL)


def blank(text):
    """The same number of lines, without words."""
    return '""' + "\n" * text.count("\n")


class Tree:
    def __init__(self, root):
        self.root = root
        self.problems = []
        self.files = sorted(
            path.relative_to(root).as_posix()
            for part in ("proto", "daemon", "client", "tests")
            for path in (root / part).rglob("*")
            if path.suffix in (".cpp", ".hpp", ".h", ".c"))
        self.includes = {}  # file: [(line, file of this project)]

    def check(self):
        for file in self.files:
            self.check_file(file)
        self.check_cycles()
        return sorted(self.problems)

    def problem(self, file, line, sentence):
        self.problems.append((file, line, sentence))

    def check_file(self, file):
        text = (self.root / file).read_text(encoding="utf-8")
        code = COMMENT.sub(lambda m: m[0] if m["text"] else blank(m[0]), text)
        self.includes[file] = []
        for match in INCLUDE.finditer(code):
            self.check_include(file, code.count("\n", 0, match.start()) + 1, *match.groups())
        if file.startswith("client/") and not file.startswith(("client/cowctl/", "client/examples/")):
            self.check_library_file(file, COMMENT.sub(lambda m: blank(m[0]), text))
        if file.startswith("daemon/"):
            self.check_daemon_file(file, COMMENT.sub(lambda m: blank(m[0]), text))

    def check_include(self, file, line, bracket, name):
        target = self.resolve(file, name)
        if target:
            self.includes[file].append((line, target))
        if file.startswith(("proto/", "client/")) and name.startswith(NOT_IN_LIBRARIES):
            self.problem(file, line, f"<{name}> belongs to the daemon.")
        ours = bracket == '"' or name.startswith(("proto/", "daemon/", "client/", "cowmgr/", "tests/"))
        part = max((p for p in PARTS if file.startswith(p)), key=len, default=None)
        if ours and part and not name.startswith(PARTS[part]):
            self.problem(file, line, f'{part} includes only {" and ".join(PARTS[part])} of this project, not "{name}".')
        elif file.startswith("daemon/") and name.startswith("daemon/"):
            self.check_layer(file, line, name)
        if target and file.startswith(("proto/", "daemon/")) and target.startswith("client/"):
            self.problem(file, line, f'"{name}" belongs to the client.')
        if target and target.startswith(POOL_FOLDER) and file.startswith("client/") and not file.startswith(USES_POOL):
            self.problem(file, line, f'"{name}" belongs to the pool, which lies above the rest of the library.')
        if target and is_library_file(file) and is_library_file(target) and library_layer(target) > library_layer(file):
            self.problem(file, line, f'"{name}" is above {Path(file).stem}: includes flow down.')
        if file.startswith(PUBLIC_FOLDERS):
            self.check_public_include(file, line, f'"{name}"' if bracket == '"' else f"<{name}>")

    def check_public_include(self, file, line, include):
        more = PUBLIC_INCLUDE_OF.get(Path(file).name)
        if not PUBLIC_INCLUDE.fullmatch(include) and not (more and more.fullmatch(include)):
            self.problem(file, line, f"a public header includes the standard library, tl::expected and cowmgr/, not {include}.")

    def check_layer(self, file, line, name):
        below, above = layer_of(file), layer_of(name)
        if None not in (below, above) and DAEMON_LAYERS.index(above) > DAEMON_LAYERS.index(below):
            self.problem(file, line, f'"{name}" is above daemon/{below}: includes flow down.')

    def check_library_file(self, file, code):
        if is_library_file(file) and library_layer(file) < 0:
            self.problem(file, 1, "this file has no layer: name it in LIBRARY_LAYERS of tests/unit/layering_test.py.")
        if file in LIBRARY_MUTEX_FILES:
            return
        for match in MUTEX.finditer(code):
            self.problem(file, code.count("\n", 0, match.start()) + 1,
                         f"{match[0]}: a forked child may find it locked; use pool_mutex() of client/fork_guard.hpp.")

    def check_daemon_file(self, file, code):
        if layer_of(file) is None:
            self.problem(file, 1, "this file has no layer: its folder is none of DAEMON_LAYERS of tests/unit/layering_test.py.")
        if file == SHM_FILE:
            return
        for match in SHM_CALL.finditer(code):
            if (file, match[0]) not in SHM_CALL_ELSEWHERE:
                self.problem(file, code.count("\n", 0, match.start()) + 1, f"{match[0]} belongs in {SHM_FILE}.")

    def resolve(self, file, name):
        """The file of this project that an include means, or None (the system's, or generated)."""
        beside = (self.root / file).parent / name
        for path in (beside, self.root / name, *(self.root / folder / name for folder in PUBLIC_FOLDERS)):
            if path.is_file():
                return path.resolve().relative_to(self.root).as_posix()
        return None

    def check_cycles(self):
        done = set()

        def visit(file, trail):
            for line, target in self.includes.get(file, ()):
                if target in trail:
                    cycle = trail[trail.index(target):] + [target]
                    self.problem(file, line, "these include each other: " + " -> ".join(cycle) + ".")
                elif target not in done:
                    visit(target, trail + [target])
            done.add(file)

        for file in self.files:
            if file not in done:
                visit(file, [file])


def layer_of(file):
    """The folder of the daemon that a file lies in, or its own name; None if that has no layer."""
    name = Path(file).relative_to("daemon").with_suffix("").parts[0]
    return name if name in DAEMON_LAYERS else None


def is_library_file(file):
    return Path(file).parent == Path("client")


def library_layer(file):
    """The height of a file in LIBRARY_LAYERS; -1 if it has none."""
    return next((height for height, names in enumerate(LIBRARY_LAYERS) if Path(file).stem in names), -1)


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1], "proto").is_dir():
        sys.exit("usage: layering_test.py SOURCE_DIR")
    problems = Tree(Path(sys.argv[1]).resolve()).check()
    for file, line, sentence in problems:
        print(f"{file}:{line}: {sentence}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
