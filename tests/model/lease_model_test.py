#!/usr/bin/env python3
"""Checks lease.pml with Spin: as it is nothing goes wrong, and where a rule is broken what must."""

import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).with_name("lease.pml")
TIMEOUT_S = 800
STEP_LINES = 20

# For the compiler of what Spin makes: https://spinroot.com/spin/Man/Pan.html. Partial order reduction is off:
# it gains little where nearly every step touches what others see.
EVERY_STATE = ["-O1", "-DSAFETY", "-DNOCLAIM", "-DNOREDUCE"]
SHORTEST_WAY = ["-O0", "-DSAFETY", "-DNOCLAIM", "-DNOREDUCE", "-DBFS"]  # to an error, if it is short
ANY_WAY = ["-O0", "-DSAFETY", "-DNOCLAIM", "-DNOREDUCE"]
EVERY_PATH = ["-O0", "-DNOREDUCE"]  # of the ltl formula

# What is searched, the macros of the model, and the property that fails (the numbers are the model's).
RUNS = [
    (EVERY_STATE, ["KILLS=2", "DEATHS=1"], None),
    (EVERY_STATE, ["KILLS=2", "DEATHS=0", "NEW_WHEN_LATE"], None),
    (EVERY_PATH, ["KILLS=1", "DEATHS=1"], None),
    (SHORTEST_WAY, ["KILLS=1", "DEATHS=0", "FREES_COMMITTED"], "1, 2"),
    (SHORTEST_WAY, ["KILLS=1", "DEATHS=0", "NO_AGAIN"], "3"),
    (SHORTEST_WAY, ["KILLS=1", "DEATHS=0", "AGAIN_BY_SESSION", "NEW_WHEN_LATE"], "3"),
    (SHORTEST_WAY, ["KILLS=1", "DEATHS=0", "NO_HOLD_LIST"], "4"),
    (EVERY_PATH, ["KILLS=1", "DEATHS=0", "NO_HOLD_LIST"], "4"),
    (ANY_WAY, ["KILLS=2", "DEATHS=0", "HOLD_BY_SLOT"], "4"),
    (SHORTEST_WAY, ["KILLS=1", "DEATHS=0", "FORGETS_ATTEMPT"], "5"),
    (SHORTEST_WAY, ["KILLS=1", "DEATHS=0", "FREES_THE_RESUMED"], "6"),
    (SHORTEST_WAY, ["KILLS=1", "DEATHS=0", "CLEARS_HOLDER"], "6"),
    (SHORTEST_WAY, ["KILLS=1", "DEATHS=0", "REUSES_SESSIONS"], "6"),
]


def run(*command, folder):
    done = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=TIMEOUT_S)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def cpu_seconds():
    """Of all that was run: what others do on this machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def verify(search, flags, folder):
    run("spin", *flags, "-a", MODEL.name, folder=folder)
    run("cc", "-w", *search, "-o", "pan", "pan.c", folder=folder)
    return run("./pan", "-m10000", *(["-a"] if search is EVERY_PATH else []), folder=folder)


def replay(flags, folder):
    """The way to the error: the messages, a column for each process; the last steps; where they led."""
    told = [run("spin", "-t", how, *flags, MODEL.name, folder=folder).splitlines() for how in ("-c", "-p")]
    noise = re.compile(r"^\t\tqueue|\[(s|a|again) = |\[(else|\.\(goto\))\]")
    chart, steps = ([line for line in lines if not noise.search(line)] for lines in told)
    end = next(at for at, line in enumerate(steps) if line.startswith("#processes"))
    return chart[:chart.index("-------------")] + steps[max(0, end - STEP_LINES):]


def failed_property(said, trail):
    """The number beside the assert that failed, or 4: somebody waits for ever."""
    if "assertion violated" not in said:
        return "4"
    number = re.search(rf"{MODEL.name}:(\d+), Error: assertion violated", "\n".join(trail)).group(1)
    return re.search(r"/\* (\d[\d, ]*?) ?(:|\*/)", MODEL.read_text().splitlines()[int(number) - 1]).group(1)


def unreached(said):
    """The statements that were never executed."""
    return {(int(line), text) for line, text in re.findall(rf"{MODEL.name}:(\d+), state \d+, (.*)", said)
            if text != '"-end-"'}


def check(search, macros, expected, folder, never):
    begin = cpu_seconds()
    flags = [f"-D{macro}" for macro in macros]
    said = verify(search, flags, folder)
    states = int(re.search(r"(\d+) states, stored", said).group(1))
    trail = replay(flags, folder) if "errors: 0" not in said else []
    failed = failed_property(said, trail) if trail else None
    # With these, "no error" is said of a part.
    early = [] if trail else re.findall(r".*(?:not completed|too small).*", said)
    is_good = failed == expected and not early
    if search is EVERY_STATE:
        never.append(unreached(said))
    outcome = f"property {failed} fails" if failed else "all holds"
    print(f"{'ok  ' if is_good else 'FAIL'} {' '.join(macros):48} {outcome:21} {states:8} states "
          f"{cpu_seconds() - begin:5.1f} s", flush=True)
    if not is_good:
        print(f"expected: {'property ' + expected + ' fails' if expected else 'all holds'}",
              *early, *trail, sep="\n")
    return is_good


def main():
    results = []
    never = []
    for one in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / MODEL.name).write_bytes(MODEL.read_bytes())
            results.append(check(*one, folder, never))
    for line, text in sorted(set.intersection(*never)):
        results.append(False)
        print(f"FAIL {MODEL.name}:{line}: never executed: {text}")
    print(f"{sum(results)} of {len(results)} as expected, {cpu_seconds():.1f} s of CPU")
    sys.exit(0 if all(results) else 1)


main()
