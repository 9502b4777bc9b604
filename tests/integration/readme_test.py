"""Runs the examples of the README, twice: those in the shell, then those in C++, which are one program together.

Usage: readme_test.py program README FILE    writes that program
       readme_test.py test README BIN_DIR    runs it, as BIN_DIR/readme_examples, and the others
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
from programs import TIMEOUT_S, start_daemon  # noqa: E402  (found by the line above)

# What the README leaves to its reader.
PROGRAM = """#include <cmath>
#include <iostream>
#include <numeric>
#include <span>
#include <vector>
{includes}
void classify(cowmgr::Rows rows, std::span<std::uint8_t> labels) {{
  for (auto& label : labels) label = static_cast<std::uint8_t>(rows.begin % 10);
}}
std::uint64_t measure(std::uint64_t index) {{ return index * index; }}
void use(std::uint64_t index, std::span<const std::byte> length) {{
  if (length.size() != sizeof index) throw std::runtime_error("a length of another size");
}}
int main() {{
  try {{
{examples}
    std::cout << pixels.size() << ' ' << weights.size() << ' ' << predictions.shape()[0] << ' '
              << doubled.shape()[0] << ' ' << power << '\\n';
    return 0;
  }} catch (const cowmgr::Exception& refused) {{
    std::cerr << to_string(refused.code()) << ": " << refused.what() << '\\n';
    return 1;
  }}
}}
"""


def blocks(readme, language):
    """The fenced blocks of that language: the number of their first line, and their lines."""
    text = Path(readme).read_text(encoding="utf-8")
    for block in re.finditer(rf"(?ms)^```{language}\n(.*?)^```$", text):
        yield text.count("\n", 0, block.start(1)) + 1, block[1].splitlines()


def write_program(readme, file):
    includes, examples = [], []
    for first, lines in blocks(readme, "cpp"):
        includes += [line for line in lines if line.startswith("#include")]
        examples.append(f'#line {first} "README.md"')
        examples += ["" if line.startswith("#include") else line for line in lines]
    Path(file).write_text(PROGRAM.format(includes="\n".join(includes), examples="\n".join(examples)), encoding="utf-8")


def check(holds, complaint):
    if not holds:
        raise AssertionError(complaint)


class Tour:
    """The commands of the README's tour, in a folder and an instance of the test's own."""

    def __init__(self, readme, programs, folder):
        self.folder = folder
        commands = [line[2:] for _, lines in blocks(readme, "") for line in lines if line.startswith("$ ")]
        (daemon,) = [command for command in commands if command.endswith(" &")]
        (path,) = re.findall(r"--socket (\S+)", daemon)
        self.socket = f"{folder}/tour.sock"
        here = [command.replace(path, self.socket) for command in commands if command != daemon]
        self.daemon = [*shlex.split(daemon.removesuffix(" &").replace(path, self.socket)), "--instance", f"readme-{os.getpid()}"]
        self.script = "\n".join(["set -e", *here])
        self.environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}

    def start(self):
        """Waits until it serves, as a person does who types the next command."""
        return start_daemon(self.daemon, self.folder, self.environment)

    def run(self, *command, **environment):
        return subprocess.run(command, cwd=self.folder, env=self.environment | environment, timeout=TIMEOUT_S, text=True,
                              check=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_once(tour, last):
    daemon = tour.start()
    try:
        shell = tour.run("bash", "-c", tour.script)
        check(shell.returncode == 0, f"the tour's commands: {shell.returncode}\n{shell.stdout}{shell.stderr}")
        check("mnist/train" in shell.stdout, shell.stdout)
        program = tour.run("readme_examples", COWMGR_SOCKET=tour.socket)
        check(program.returncode == 0, f"the examples: {program.returncode}\n{program.stdout}{program.stderr}")
        check(program.stdout == "470400 1000000 10000 600 1024\n", program.stdout)
        check(program.stderr.startswith("not_found: "), program.stderr)
        if last:
            check(tour.run("cowctl", "shutdown", "--purge", COWMGR_SOCKET=tour.socket).returncode == 0, "no shutdown")
    finally:
        if not last:
            daemon.send_signal(signal.SIGTERM)
        daemon.wait(TIMEOUT_S)


def test(readme, programs):
    with tempfile.TemporaryDirectory(prefix="readme-") as folder:
        subprocess.run(["/usr/bin/python3", "-c", "import numpy; numpy.save('train.npy', numpy.zeros((600, 784), 'f4'))"],
                       cwd=folder, check=True)
        tour = Tour(readme, programs, folder)
        alone = tour.run("readme_examples", COWMGR_SOCKET=f"{folder}/nobody.sock")
        check(alone.returncode == 1 and alone.stderr.startswith("no_daemon: "), f"without a daemon: {alone}")
        run_once(tour, last=False)
        run_once(tour, last=True)


{"program": write_program, "test": test}[sys.argv[1]](*sys.argv[2:])
