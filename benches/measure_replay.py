#!/usr/bin/env python3
# The half of replay-compare.sh that makes the traces, runs the commands in turn and prints the report.
"""Runs thin_replay, fio and blkparse on the same traces and prints a Markdown report."""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Of blocks that are not mapped yet, and of those that are; how many blocks generate-trace has requests for.
SHAPES = ("provisioning", "filling", "uniform", "locality")
# Those of them that give each block of an empty pool its first write: they have a request for each block, as nothing is provisioned twice.
EMPTY = ("provisioning", "filling")
BLOCKS = 1 << 20
# The device of the traces, as a thin device of 64 GiB; that of the CSV.
MAP = ["--map", "254:1=0:64g"]
MAP_CSV = ["--map", "0=0:64g"]
# What a replay may take: bytes for each mapped block, and beside them.
PER_BLOCK = 32
BESIDE = 64 << 20


class Run:
    """One run of a command: seconds by the wall, seconds of processors, peak memory in bytes."""

    def __init__(self, folder, argv, source=None, stdout=subprocess.DEVNULL):
        told = folder / "time.txt"
        command = ["/usr/bin/time", "-f", "%M", "-o", str(told), *argv]
        before = time.perf_counter()
        child = subprocess.Popen(command, stdin=source or subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, cwd=folder)
        said = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        self.wall = time.perf_counter() - before
        self.cpu = used.ru_utime + used.ru_stime
        if child.returncode != 0:
            sys.exit(f"{' '.join(argv)}: exit {child.returncode}\n{said.decode(errors='replace')}")
        self.memory = int(told.read_text().split()[-1]) << 10


class Row:
    """A command whose runs are reported; how it does is told in requests, and in records if it reads so many for each of them."""

    def __init__(self, name, argv, is_peer=False, records=None):
        self.name, self.argv, self.is_peer, self.records, self.runs = name, argv, is_peer, records, []

    def median(self, of):
        """The median of something of all runs."""
        return statistics.median(of(run) for run in self.runs)

    def cells(self, requests, fio):
        """Rates by the wall, CPU time, how many times fio's rate by both, peak memory."""
        wall, cpu = self.median(lambda run: run.wall), self.median(lambda run: run.cpu)
        records = f"{requests * self.records / wall / 1e6:.2f}" if self.records else ""
        cells = [f"{requests / wall / 1e6:.2f}", records, f"{requests / cpu / 1e6:.2f}", f"{cpu:.2f}"]
        if fio is None:
            cells += ["", ""]
        else:
            cells.append(f"{fio.median(lambda run: run.wall) / wall:.1f}")
            cells.append(f"{fio.median(lambda run: run.cpu) / cpu:.1f}")
        return [*cells, f"{self.median(lambda run: run.memory) / 2**20:.0f}"]


def print_row(cells):
    """A row of a table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def measure(args, rows):
    """All rows in turn, as often as is asked for."""
    for _ in range(args.runs):
        for row in rows:
            row.runs.append(Run(args.folder, row.argv))


def generate(args, *words, stdout=None):
    """Makes a trace."""
    subprocess.run([str(args.generator), *words], check=True, cwd=args.folder, stdout=stdout)


def reading(replay, name, dump, records):
    """Rows that read a blktrace and nothing else."""
    dry = [*replay, "--dry-run"]
    files = Row("thin_replay, reading only, files", [*dry, f"{name}.blktrace.0"], records=records)
    return [files, Row("thin_replay, reading only, dump", [*dry, dump], records=records)]


def rates(args):
    """The table of rates."""
    wanted = args.events or 4_000_000
    replay = [str(args.ours), "thin_replay", "--quiet"]
    print("| trace | command | M requests/s | M records/s | M requests per CPU s | CPU s | of fio's rate | by CPU time | peak MiB |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    generate(args, "provisioning", "blktrace", str(BLOCKS), "1", "start")
    pool = ["--create", "--data-size", "1t", "--metadata-size", "256m"]
    Run(args.folder, [*replay, *pool, *MAP, "-o", "mapped.img", "start.blktrace.0"])
    for shape in SHAPES:
        is_empty = shape in EMPTY
        events = min(wanted, BLOCKS) if is_empty else wanted
        generate(args, shape, "blktrace", str(events), "2", shape)
        dump = f"{shape}.blktrace-dump"
        make_dump = ["blkparse", "-q", "-O", "-i", shape, "-d", dump]
        Run(args.folder, make_dump)
        start = pool if is_empty else ["--metadata", "mapped.img", "--data-size", "1t"]
        fresh = ["sh", "-c", 'rm -f report.json && exec "$@"', "sh"]
        whole = [*replay, *start, *MAP, "--json", "report.json", "--max-sectors", "1024"]
        fio = ["fio", "--name=replay", "--ioengine=null", "--iodepth=32", "--thread", "--replay_no_stall=1"]
        fio += ["--replay_redirect=/dev/null", f"--read_iolog={dump}"]
        peer = Row("fio, null engine", fio, is_peer=True)
        rows = [
            *(Row(f"thin_replay, locks {locks}", [*fresh, *whole, "--locks", locks, dump]) for locks in ("kernel", "optimistic")),
            peer,
        ]
        if not is_empty:
            rows += [
                *reading(replay, shape, dump, 2),
                Row("blkparse, text", ["blkparse", "-q", "-i", shape], is_peer=True, records=2),
                Row("blkparse -d", make_dump, is_peer=True, records=2),
            ]
        measure(args, rows)
        for row in rows:
            print_row([shape, row.name, *row.cells(events, None if row.is_peer else peer)])
        for path in args.folder.glob(f"{shape}.*"):
            path.unlink()
    generate(args, "locality", "blktrace-queue", str(wanted), "2", "queued")
    dump = "queued.blktrace-dump"
    Run(args.folder, ["blkparse", "-q", "-O", "-i", "queued", "-d", dump])
    rows = reading(replay, "queued", dump, 1)
    measure(args, rows)
    for row in rows:
        print_row(["locality, -a queue", row.name, *row.cells(wanted, None)])
    with open(args.folder / "volumes.csv", "xb") as file:
        generate(args, "random", "alibaba", str(wanted), "1000", stdout=file)
    row = Row("thin_replay, reading only", [*replay, "--dry-run", "--format", "alibaba", "volumes.csv"])
    measure(args, [row])
    print_row(["CSV of 1000 volumes", row.name, *row.cells(wanted, None)])


def memory(args):
    """The table of peak memory."""
    events = args.events or 100_000_000
    print("| events | mapped blocks | bound MiB | peak MiB | holds |")
    print("|--:|--:|--:|--:|---|")
    holds = True
    for count in (events // 10, events):
        report = args.folder / "report.json"
        report.unlink(missing_ok=True)
        source = subprocess.Popen([str(args.generator), "locality", "alibaba", str(count)], stdout=subprocess.PIPE)
        argv = [str(args.ours), "thin_replay", "--quiet", "--format", "alibaba", "--json", str(report), "--data-size", "64g"]
        try:
            run = Run(args.folder, [*argv, *MAP_CSV, "-"], source.stdout)
        finally:
            source.stdout.close()
            source.kill()
            source.wait()
        space = json.loads(report.read_text())[0]["space"]
        mapped = space["used_data_blocks"]
        bound = mapped * PER_BLOCK + BESIDE
        holds &= run.memory <= bound
        print_row([str(count), str(mapped), f"{bound / 2**20:.1f}", f"{run.memory / 2**20:.1f}", "yes" if run.memory <= bound else "**no**"])
    return 0 if holds else 1


def main():
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the traces")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--events", type=int)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--ours", type=Path, required=True)
    parser.add_argument("--generator", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"{platform.system()} {platform.release()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.2f} when this began\n")
    return memory(args) if args.memory else rates(args)


if __name__ == "__main__":
    sys.exit(main())
