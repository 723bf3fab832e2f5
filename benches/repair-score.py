#!/usr/bin/env python3
"""Damages images of thin pool metadata in many ways, lets thin_repair of several builds repair them, and counts the mappings kept.

  repair-score.py --ours BIN [--other NAME=BIN_OR_DIR]... --tools BIN --images FILE... [--seeds N] [--jobs N] [--limit SECONDS]

BIN is one binary with all commands, called thintools* or pdata_tools*, or any other program that is thin_repair itself; a
directory has thin_repair in it. --tools is a thintools built with `--features devtools`, by default the one given as --ours.
Images may be compressed with zstd or gzip; they must be whole. A Markdown report goes to standard output, progress to
standard error. The same seeds make the same damage. Only Python's standard library is needed.

Mappings are held if the leaf that has them was not damaged; a leaf that n devices share counts n times. What a repair ought
to recover is all that is held. When block 0 is damaged, every build alike is told the data block size, the size of the data
device and the transaction id, which are on record elsewhere in real life.

Failures are a panic, a signal, a time-out, and a result that was reported as one but cannot be read or is fatally damaged.
Wrong mappings are in the result but were not in the image; a stale leaf, sealed for its place, cannot be told from a good one.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib

TYPES = ["zero", "bit-flip", "junk", "torn", "stale", "misdirected", "swapped", "sector"]
# Statuses with which a thin_repair says that there is a result; and the one of our thin_check that says it is none.
SUCCESS = (0, 4)
FATAL = 5
SPACE_MAPS = ["metadata-index", "metadata-bitmap", "metadata-counts", "data-index", "data-bitmap", "data-counts"]


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="Every run of thin_repair is ended after --timeout seconds."
    )
    parser.add_argument("--ours", required=True, metavar="BIN", help="the build to judge")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=BIN", help="a build to compare with")
    parser.add_argument("--tools", metavar="BIN", help="thintools with the feature devtools [default: --ours]")
    parser.add_argument("--images", required=True, nargs="+", metavar="FILE", help="whole metadata")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how often each scenario is tried [default: 1]")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N", help="the first of the seeds [default: 1]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at the same time [default: 2]")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="begin no case after this [default: 600]")
    parser.add_argument("--timeout", type=float, default=30, metavar="SECONDS", help="limit of one repair [default: 30]")
    parser.add_argument("--only", metavar="REGEX", help="only cases whose 'image scenario seed' matches")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="list the N cases in which ours lost most")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    return parser.parse_args()


def repair_command(path):
    """How to run thin_repair of a build."""
    path = os.path.realpath(path) if os.path.isdir(path) else os.path.abspath(path)
    if os.path.isdir(path):
        return [os.path.join(path, "thin_repair")]
    name = os.path.basename(path)
    return [path, "thin_repair"] if name.startswith(("thintools", "pdata_tools")) else [path]


def scenarios(kinds, seed):
    """The damage to do to an image with these blocks: (row of the table, name, specs)."""
    there = [kind for kind, count in kinds.items() if count and kind != "held"]
    for kind in there:
        for damage in TYPES:
            yield f"one {kind}", f"one:{kind}:{damage}", [f"{kind}:{damage}:1"]

    def several(name, targets):
        draw = random.Random(f"{name} {seed}")
        specs = [f"{kind}:{draw.choice(TYPES)}:{count}" for kind, count in targets]
        return name, name.replace(" ", "-"), specs

    yield several("5 of any kind", 5 * [("any", 1)])
    for kind in there:
        if kinds[kind] > 1:
            yield several(f"1/4 of {kind}", [(kind, "1/4")])
    if kinds["inner"]:
        yield several("superblock and 1/4 of inner", [("superblock", 1), ("inner", "1/4")])
    yield several("superblock and space maps", [("superblock", 1)] + [(kind, "all") for kind in SPACE_MAPS])
    yield several("top-level and details", [(kind, "all") for kind in ("top-level-root", "top-level", "details")])


class Failed(Exception):
    """A tool of ours did not do what it is for."""


def tool(command):
    """What a tool prints as JSON."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        raise Failed(f"{shlex.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def remove(path):
    """Removes a file that may not be there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def measure(command, log, timeout):
    """Runs a command to its end, or ends it: exit status, seconds, KiB of memory, whether it took too long."""
    with open(log, "wb") as output:
        began = time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        late = threading.Event()

        def end():
            late.set()
            child.kill()

        timer = threading.Timer(timeout, end)
        timer.start()
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        timer.cancel()
        timer.join()
        child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, seconds, usage.ru_maxrss, late.is_set()


def run_case(case):
    """Damages an image, and for each build repairs and compares it."""
    setup, folder = run_case.setup, run_case.folder
    if time.monotonic() > setup["deadline"]:
        return dict(case, skipped=True)
    try:
        return damage_and_repair(case, setup, folder)
    except (Failed, subprocess.TimeoutExpired, OSError, ValueError) as error:
        return dict(case, error=str(error))


def damage_and_repair(case, setup, folder):
    """The work of run_case()."""
    image = setup["images"][case["image"]]
    tools, truth, stock = setup["tools"], image["copy"], image["stock"]
    damaged, out, log = (os.path.join(folder, name) for name in ("damaged.img", "out.img", "log"))
    remove(damaged)
    specs = [word for spec in case["specs"] for word in ("--damage", spec)]
    blocks = tool([tools, "thin_generate_damage", "-i", truth, "-o", damaged, *specs, "--seed", str(case["number"]), "--json"])
    listed = os.path.join(folder, "damaged.json")
    with open(listed, "w", encoding="utf-8") as file:
        json.dump(blocks, file)
    hints = []
    if any(one["block"] == 0 for one in blocks["damaged"]):
        for option in ("data-block-size", "nr-data-blocks", "transaction-id"):
            hints += [f"--{option}", str(stock[option.replace("-", "_")])]
    builds = {}
    for name, command in setup["builds"].items():
        remove(out)
        with open(out, "wb") as file:
            file.truncate(os.path.getsize(truth))
        command = [*command, "-i", damaged, "-o", out, *hints]
        code, seconds, memory, late = measure(command, log, setup["timeout"])
        with open(log, "rb") as file:
            text = file.read(65536).decode("utf-8", "replace")
        failure = None
        if late:
            failure = "time-out"
        elif code == 101 or "panicked" in text:
            failure = "panic"
        elif code < 0:
            failure = f"signal {-code}"
        found = tool([tools, "thin_compare_mappings", "--truth", truth, "--damaged-blocks", listed, "--result", out])
        check = None
        if not found["unreadable"]:
            check = measure([tools, "thin_check", "-q", out], os.devnull, setup["timeout"])[0]
        if failure is None and code in SUCCESS and (found["unreadable"] or check == FATAL):
            failure = "useless result"
        builds[name] = dict(found, exit=code, seconds=seconds, kib=memory, failure=failure, check=check, hints=hints)
    return dict(case, damaged=blocks["damaged"], builds=builds)


def start_worker(setup):
    """Gives a process of the pool what it needs."""
    run_case.setup = setup
    run_case.folder = tempfile.mkdtemp(dir=setup["folder"])


def make_cases(images, seeds):
    """All cases, so ordered that those of one seed come before those of the next."""
    for seed in seeds:
        for name, image in images.items():
            for row, scenario, specs in scenarios(image["stock"]["kinds"], f"{name} {seed}"):
                key = f"{name} {scenario} {seed}"
                yield {
                    "image": name,
                    "row": row,
                    "scenario": scenario,
                    "seed": seed,
                    "specs": specs,
                    # Every case has blocks of its own.
                    "number": zlib.crc32(key.encode()),
                    "key": key,
                }


def shown(number, of):
    """A ratio in percent; rounded down, so that 100 % is all."""
    return "-" if not of else f"{number * 10000 // of / 100:.2f} %"


def table(results, names):
    """The report's table, a row for each kind or scenario."""
    head = ["damage", "cases", "held"]
    for name in names:
        head += [f"{name}: recovered", "ratio", "wrong", "failures", "median ms", "peak MiB"]
    rows = {}
    for result in results:
        rows.setdefault(result["row"], []).append(result)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row, cases in [*rows.items(), ("**total**", results)]:
        held = sum(case["builds"][names[0]]["held"] for case in cases)
        line = [row, str(len(cases)), str(held)]
        for name in names:
            runs = [case["builds"][name] for case in cases]
            recovered = sum(run["recovered"] for run in runs)
            line += [
                str(recovered),
                shown(recovered, held),
                str(sum(run["wrong"] for run in runs)),
                str(sum(run["failure"] is not None for run in runs)),
                f"{statistics.median(run['seconds'] for run in runs) * 1000:.0f}",
                f"{max(run['kib'] for run in runs) / 1024:.0f}",
            ]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reproduce(case, name, setup):
    """The command lines that make and repair the damage of a case."""
    specs = [word for spec in case["specs"] for word in ("--damage", spec)]
    path = setup["images"][case["image"]]["path"]
    damage = [setup["tools"], "thin_generate_damage", "-i", path, "-o", "damaged.img", *specs, "--seed", str(case["number"])]
    repair = [*setup["builds"][name], "-i", "damaged.img", "-o", "out.img", *case["builds"][name]["hints"]]
    return f"{shlex.join(damage)}; truncate -r damaged.img out.img; {shlex.join(repair)}"


def describe(case, name, setup):
    """A case in a few lines."""
    run = case["builds"][name]
    facts = [f"exit {run['exit']}", f"recovered {run['recovered']} of {run['held']}", f"wrong {run['wrong']}"]
    facts += [run["failure"]] if run["failure"] else []
    facts += [f"thin_check {run['check']}"] if run["check"] else []
    if run["unreadable"]:
        facts.append(f"unreadable: {run['unreadable']}" if run["exit"] in SUCCESS else "no result")
    others = [f"{other} {found['recovered']}" for other, found in case["builds"].items() if other != name]
    facts += [f"others: {', '.join(others)}"] if others else []
    return f"* {case['key']}: {'; '.join(facts)}\n  `{reproduce(case, name, setup)}`"


def is_suspect(case, name):
    """Whether a case deserves a look: a crash, invented mappings, or a loss that nothing forced."""
    run = case["builds"][name]
    single = case["row"].startswith("one ") and case["row"] != "one leaf"
    lost = single and run["recovered"] < run["held"]
    return bool(run["wrong"] or run["failure"] or run["check"] or lost)


def report(results, setup, worst):
    """Prints everything."""
    names = list(setup["builds"])
    done = [result for result in results if "builds" in result]
    skipped = sum("skipped" in result for result in results)
    failed = [result for result in results if "error" in result]
    print("# Repair score\n")
    for name, command in setup["builds"].items():
        print(f"* {name}: `{shlex.join(command)}`")
    print(f"* {len(done)} cases of {len(results)}" + (f"; {skipped} left out for lack of time" if skipped else ""))
    print("* memory below some 12 MiB is that of the process that measures\n")
    if done:
        print(table(done, names))
    suspects = [case for case in done if is_suspect(case, names[0])]
    print(f"\n## {len(suspects)} cases of {names[0]} to look at\n")
    print("Wrong mappings, a failure, a result that thin_check objects to, or held mappings lost although only one block was")
    print("damaged, and that no leaf.\n")
    for case in suspects:
        print(describe(case, names[0], setup))
    if worst:
        print(f"\n## The {worst} cases in which {names[0]} lost most\n")
        loss = lambda case: case["builds"][names[0]]["held"] - case["builds"][names[0]]["recovered"]
        lossy = sorted((case for case in done if loss(case)), key=lambda case: (-loss(case), case["key"]))
        for case in lossy[:worst]:
            print(describe(case, names[0], setup))
    if failed:
        print(f"\n## {len(failed)} cases that could not be tried\n")
        for case in failed:
            print(f"* {case['key']}: {case['error']}")
    return not failed


def folder_with_room(bytes_needed):
    """Where temporary files go: memory if there is room for twice what is needed."""
    try:
        if shutil.disk_usage("/dev/shm").free > 2 * bytes_needed:
            return "/dev/shm"
    except OSError:
        pass
    return None


def image_name(path, taken):
    """A short name for an image: that of its folder, and its own unless that is meta."""
    name = os.path.basename(path).split(".")[0]
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    short = folder if name == "meta" else f"{folder}/{name}"
    return short if short not in taken else path


def main():
    """Runs all cases; the exit status says whether they could be tried."""
    given = arguments()
    began = time.monotonic()
    setup = {
        "tools": os.path.abspath(given.tools or given.ours),
        "builds": {"ours": repair_command(given.ours)},
        "timeout": given.timeout,
        "deadline": began + given.limit,
        "images": {},
    }
    for other in given.other:
        name, _, path = other.partition("=")
        if not path:
            sys.exit(f"--other {other}: give NAME=BIN")
        setup["builds"][name] = repair_command(path)
    for command in setup["builds"].values():
        if not os.access(command[0], os.X_OK):
            sys.exit(f"there is no program {command[0]}")
    with tempfile.TemporaryDirectory(prefix="repair-score.", dir=folder_with_room(2 << 30)) as folder:
        setup["folder"] = folder
        for path in given.images:
            name = image_name(path, setup["images"])
            copy = os.path.join(folder, f"truth-{len(setup['images'])}.img")
            try:
                stock = tool([setup["tools"], "thin_generate_damage", "-i", path, "--inventory", "-o", copy])
            except Failed as error:
                sys.exit(f"{path} cannot be used: {error}")
            setup["images"][name] = {"path": os.path.abspath(path), "copy": copy, "stock": stock}
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        cases = list(make_cases(setup["images"], seeds))
        if given.only:
            cases = [case for case in cases if re.search(given.only, case["key"])]
        if not cases:
            sys.exit(f"no case matches {given.only!r}")
        results = []
        with multiprocessing.Pool(given.jobs, start_worker, (setup,)) as pool:
            for number, result in enumerate(pool.imap(run_case, cases, chunksize=4), 1):
                results.append(result)
                if number % 50 == 0 or number == len(cases):
                    print(f"{number} of {len(cases)}, {time.monotonic() - began:.0f} s", file=sys.stderr)
        if given.json:
            with open(given.json, "w", encoding="utf-8") as file:
                json.dump({"builds": setup["builds"], "results": results}, file, indent=1)
        sys.exit(0 if report(results, setup, given.worst) else 1)


if __name__ == "__main__":
    main()
