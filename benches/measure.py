#!/usr/bin/env python3
# The half of compare.sh that runs the commands: verifies that they agree, times them in turn, prints the report.
"""Runs the commands of one or two tool sets on the images in a folder and prints a Markdown report."""

import argparse
import contextlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Seconds that one command may take.
PATIENCE = 60
# Seconds after the last round may begin at which everything ends.
GRACE = 120
# Runs of what takes a few milliseconds only.
SMALL_RUNS = 20
# Names of binaries that have all commands and take the command as their first argument.
MULTICALL = ("thintools", "pdata_tools")


class Result:
    """One run of a command: exit status, wall and CPU seconds."""

    def __init__(self, status, wall=0.0, cpu=0.0):
        self.status, self.wall, self.cpu = status, wall, cpu


def tool(tools, command):
    """The beginning of the command line that runs `command` from `tools`."""
    if tools.is_dir():
        return [str(tools / command)]
    if tools.name.startswith(MULTICALL):
        return [str(tools), command]
    sys.exit(f"{tools} is neither a directory nor called {' or '.join(MULTICALL)}")


class Clock:
    """When to stop: rounds of runs end at `limit`, and every command under way at `end`."""

    limit = end = 0.0

    @classmethod
    def start(cls, seconds):
        """Sets both, `seconds` from now and a while later."""
        cls.limit = time.monotonic() + seconds
        cls.end = cls.limit + GRACE

    @classmethod
    def is_over(cls):
        """No further round shall begin."""
        return time.monotonic() > cls.limit


@contextlib.contextmanager
def started(argv, stdout):
    """A running command, which is not there any more at the end of the block."""
    # With a session of its own, what the command started can be ended together with it.
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL, start_new_session=True
    )

    def end(*_):
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(max(1, int(min(PATIENCE, Clock.end - time.monotonic()))))
    try:
        yield child
    finally:
        signal.alarm(0)
        if child.returncode is None:
            end()
            child.wait()


def run(argv, stdout=subprocess.DEVNULL):
    """Runs a command to its end, quietly, and measures it."""
    began = time.perf_counter()
    try:
        with started(argv, stdout) as child:
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - began
            # Popen need not wait any more.
            child.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    except OSError as e:
        return Result(e.strerror)
    return Result(child.returncode, wall, usage.ru_utime + usage.ru_stime)


def run_for_memory(argv):
    """Runs a command under GNU time: its exit status, and its peak memory in KiB, None if that is not known.

    The kernel counts the memory of the process that starts a command as the command's own until it has more. GNU time is
    small; this interpreter is not.
    """
    gnu_time = shutil.which("time")
    if gnu_time is None:
        return run(argv).status, None
    with tempfile.NamedTemporaryFile("r") as report:
        status = run([gnu_time, "-q", "-f", "%M", "-o", report.name, *argv]).status
        words = report.read().split()
    return status, int(words[-1]) if words and words[-1].isdigit() else None


def same_output(argv, path):
    """Says whether a command succeeds and writes what is in the file; white space at the end does not matter."""
    try:
        with open(path, "rb") as expected, started(argv, subprocess.PIPE) as child:
            while True:
                # Both give as much as is asked for until they end.
                left, right = child.stdout.read(1 << 20), expected.read(1 << 20)
                if left != right:
                    break
                if not left:
                    return child.wait() == 0
            left += child.stdout.read(1 << 10)
            right += expected.read(1 << 10)
            is_end = not child.stdout.read(1) and not expected.read(1)
            return is_end and left.rstrip() == right.rstrip() and child.wait() == 0
    except OSError:
        return False


class Series:
    """One command of one tool set: what was measured."""

    def __init__(self, argv, output=None):
        self.argv, self.output = argv, output
        self.walls, self.cpus, self.flushed = [], [], []
        self.status, self.memory = run_for_memory(argv)

    def measure(self):
        """One more run, unless the command has failed; with an output the flush that makes it durable is timed, too."""
        if self.status != 0:
            return
        # What others left to write must not be in the way.
        os.sync()
        result = run(self.argv)
        self.status = result.status
        began = time.perf_counter()
        if self.output:
            with open(self.output, "rb+") as file:
                os.fsync(file.fileno())
        self.walls.append(result.wall)
        self.cpus.append(result.cpu)
        self.flushed.append(result.wall + time.perf_counter() - began)

    def median(self, values):
        """The median in milliseconds; None if the command failed."""
        return 1e3 * statistics.median(values) if self.status == 0 and values else None


def show(series, values, digits):
    """A cell with the median in milliseconds."""
    if series is None:
        return "-"
    if series.status != 0:
        return f"failed ({series.status})"
    median = series.median(values(series))
    return "-" if median is None else f"{median:.{digits}f}"


def show_memory(series):
    """A cell with the peak memory in MiB."""
    if series is None or series.status != 0 or series.memory is None:
        return "-"
    return f"{series.memory / 1024:.1f}"


def show_ratio(above, below):
    """A cell with a quotient of two medians."""
    return "-" if above is None or not below else f"{above / below:.2f}"


class Row:
    """One command on one image: ours, the other's, and the limit it is compared with."""

    def __init__(self, image, command, ours, other, limit):
        self.image, self.command, self.limit = image, command, limit
        self.ours, self.other = ours, other

    def series(self):
        """What takes part in a round, but for the limit, which several rows have."""
        return [s for s in (self.ours, self.other) if s is not None]

    def print(self, digits=0, command=None, values=lambda s: s.walls):
        """Prints the table's row."""
        ours, other = self.ours, self.other
        our_ms = ours.median(values(ours))
        other_ms = other and other.median(values(other))
        limit_ms = self.limit and self.limit.median(self.limit.walls)
        cells = [
            self.image,
            command or self.command,
            show(ours, values, digits),
            show(other, values, digits),
            show_ratio(other_ms, our_ms),
            show(ours, lambda s: s.cpus, digits),
            show(other, lambda s: s.cpus, digits),
            show_ratio(other and other.median(other.cpus), ours.median(ours.cpus)),
            show_memory(ours),
            show_memory(other),
            show(self.limit, lambda s: s.walls, 1 if digits else 0),
            show_ratio(our_ms, limit_ms),
            str(max(len(s.walls) for s in self.series())),
        ]
        print("| " + " | ".join(cells) + " |")


HEADER = (
    "| image | command | ours ms | other ms | other/ours | ours user+sys ms | other user+sys ms "
    "| other/ours user+sys | ours peak MiB | other peak MiB | read limit ms | ours/limit | runs |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def read_facts(path):
    """What generate-metadata printed about an image."""
    return {key: int(value) for key, value in (word.split("=") for word in path.read_text().split())}


def preallocate(path, size):
    """Makes a file of `size` bytes with all of its space."""
    with open(path, "xb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def cpu_model():
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def verdict(holds):
    """A word for a check."""
    return "yes" if holds else "**NO**"


def prepare(image, args):
    """Verifies that the tools agree about an image, and makes the rows to be measured. Every command runs once."""
    path = args.folder / f"{image}.img"
    xml = args.folder / f"{image}.xml"
    facts = read_facts(args.folder / f"{image}.facts")
    limit = Series([str(args.read_limit), str(path), str(facts["used_bytes"])])
    tools = [t for t in (args.ours, args.other) if t]

    def row(command, make, with_limit):
        found = [make(t) for t in tools]
        return Row(image, command, found[0], found[1] if len(found) > 1 else None, limit if with_limit else None)

    check = row("thin_check", lambda t: Series([*tool(t, "thin_check"), str(path)]), True)
    rows = [check]
    used = facts["used_bytes"] / 2**20
    checks = ", ".join(f"exit {s.status}" for s in check.series())
    said = [f"thin_check: {checks}"]

    with open(xml, "xb") as file:
        dumped = run([*tool(args.ours, "thin_dump"), str(path)], stdout=file).status
    outputs = {}

    def restore(tools):
        output = args.folder / f"{image}.{len(outputs)}.out"
        outputs[tools] = output
        preallocate(output, facts["image_bytes"])
        return Series([*tool(tools, "thin_restore"), "-i", str(xml), "-o", str(output)], output)

    if dumped == 0:
        dump = row("thin_dump", lambda t: Series([*tool(t, "thin_dump"), str(path)]), True)
        restores = row("thin_restore", restore, False)
        our_dump = tool(args.ours, "thin_dump")
        trips = [same_output([*our_dump, str(outputs[t])], xml) for t in tools]
        said.append(f"our dump, restored by us and dumped again, is the same: {verdict(trips[0])}")
        if args.other:
            others = [*tool(args.other, "thin_dump"), str(path)]
            said.append(f"restored by the other and dumped by us, too: {verdict(trips[1])}")
            said.append(f"the other's dump is the same text: {verdict(same_output(others, xml))}")
        if image != "small":
            rows += [dump, restores]
        if not all(s.status == 0 for s in restores.series()):
            said.append("restore: " + ", ".join(f"exit {s.status}" for s in restores.series()))
    else:
        said.append(f"our thin_dump failed ({dumped}): no dump or restore is measured")
    print(f"- `{image}`, {used:.1f} MiB of metadata in use: " + "; ".join(said) + ".", flush=True)
    return rows, limit


def main():
    """Verifies, measures, reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="has SHAPE.img and SHAPE.facts")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--read-limit", type=Path, required=True)
    parser.add_argument("--ours", type=Path, required=True)
    parser.add_argument("--other", type=Path)
    args = parser.parse_args()
    Clock.start(args.seconds)
    # What is left of temporary files goes away with the folder.
    tempfile.tempdir = str(args.folder)
    # A signal from outside ends the command under way, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    print("### Machine\n")
    print(f"- {os.cpu_count()} cores ({len(os.sched_getaffinity(0))} usable), {cpu_model()}")
    print(f"- {platform.system()} {platform.release()}, load {os.getloadavg()[0]:.2f} when this began")
    print("\n### Agreement\n", flush=True)

    table = []
    for image in ("fragmented", "snapshots", "small"):
        rows, limit = prepare(image, args)
        wanted = SMALL_RUNS if image == "small" else args.runs
        for _ in range(wanted):
            if Clock.is_over():
                print("out of time", file=sys.stderr)
                break
            for row in rows:
                for series in row.series():
                    series.measure()
            limit.measure()
        table.append(rows)
        for large in args.folder.glob(f"{image}.*"):
            large.unlink()

    print("\n### Times\n")
    print("Wall time and memory of whole processes, page cache warm. Times are medians of runs that took turns; memory is from")
    print("one run before them. The read limit reads the blocks up to the last one in use and checksums each.\n")
    print(HEADER)
    for rows in table:
        for row in rows:
            row.print(digits=1 if row.image == "small" else 0)
            if row.command == "thin_restore":
                row.print(command="thin_restore, then fsync", values=lambda s: s.flushed)


if __name__ == "__main__":
    main()
