#!/usr/bin/env python3
# The half of nbd-compare.sh that starts the servers, runs fio in turn and prints the report.
"""Runs the same fio jobs over thin_serve, nbdkit and qemu-nbd and prints a Markdown report."""

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

MIB = 1 << 20
# The size of an export: the parts that jobs use, and holes.
EXPORT = "32g"
# What is mapped and filled at the start: for reads and writes in place, and for writes that break sharing.
MAPPED, SHARED = (0, 512), (1024, 512)
# Holes, for each run another one: what is provisioned in small pieces, and what is filled and trimmed.
FRESH, FRESH_SIZE = 2048, 1024
TRIMMED, TRIMMED_SIZE = 16384, 256
SMALL, COUNT = 4096, 16384
# Seconds that a server may take to start or to stop.
PATIENCE = 20


def region(first, size):
    """fio's words for a part of the export, in MiB."""
    return [f"--offset={first}m", f"--size={size}m"]


class Job:
    """A job of fio: what it is called, what it does in a run, and what is expected of thin_serve."""

    def __init__(self, name, text, words, expected="", is_sized=False):
        self.name, self.text, self.words, self.expected, self.is_sized = name, text, words, expected, is_sized


def jobs():
    """All jobs. `words` is told the number of the run."""

    def mapped(how, size, depth, *more):
        return lambda _: [f"--rw={how}", f"--bs={size}", f"--iodepth={depth}", *region(*MAPPED), *more]

    def trimmed(how, depth):
        return lambda run: [f"--rw={how}", "--bs=64k", f"--iodepth={depth}", *region(TRIMMED + run * TRIMMED_SIZE, TRIMMED_SIZE)]

    def fresh(run):
        where = region(FRESH + run * FRESH_SIZE, FRESH_SIZE)
        return ["--rw=randwrite", "--bs=4k", "--iodepth=32", f"--io_size={SMALL * COUNT}", *where]

    def shared(_):
        return ["--rw=randwrite", "--bs=4k", "--iodepth=32", f"--io_size={SMALL * COUNT // 2}", *region(*SHARED)]

    mapped_bound = "≤ 13 µs; ≥ 0.8 × nbdkit, ≥ 2 × raw"
    return [
        Job("read-1", "mapped 4 KiB random read, depth 1", mapped("randread", "4k", 1)),
        Job("write-1", "mapped 4 KiB random write, depth 1", mapped("randwrite", "4k", 1)),
        Job("read-32", "mapped 4 KiB random read, depth 32", mapped("randread", "4k", 32), mapped_bound),
        Job("write-32", "mapped 4 KiB random write, depth 32", mapped("randwrite", "4k", 32), mapped_bound),
        Job("flush", "4 KiB random write and flush, depth 1", mapped("randwrite", "4k", 1, "--fsync=1"), "≥ raw"),
        Job("read-1m", "sequential read of 1 MiB, depth 4", mapped("read", "1m", 4), "CPU ≤ 1.2 × nbdkit"),
        Job("write-1m", "sequential write of 1 MiB, depth 4", mapped("write", "1m", 4), "CPU ≤ 1.2 × nbdkit"),
        Job("provision", "4 KiB random write to holes, depth 32", fresh, "≤ 30 µs; ≥ 2 × qcow2", is_sized=True),
        Job("fill", "64 KiB sequential write to holes, depth 8", trimmed("write", 8), is_sized=True),
        Job("trim", "TRIM of 64 KiB that are mapped, depth 32", trimmed("trim", 32), "≥ 3 × qcow2", is_sized=True),
        Job("break", "4 KiB random write after a snapshot, depth 32", shared, "≥ 15 000/s in memory", is_sized=True),
    ]


def run_quietly(argv):
    """Runs a command that has to succeed."""
    done = subprocess.run([str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stdout.decode(errors='replace')}")
    return done.stdout.decode(errors="replace")


class Server:
    """A server that is measured: how it is started, and how a snapshot of what it serves is made and dropped, if it can be."""

    name = ""
    has_snapshots = False

    def __init__(self, args):
        self.args, self.child = args, None
        self.folder = args.folder / self.name.replace(" ", "-")
        self.folder.mkdir()
        self.socket = self.folder / "nbd.sock"
        self.image = self.folder / "image"

    def argv(self):
        """The command line."""
        raise NotImplementedError

    def start(self):
        """Starts it, and waits until clients can connect."""
        self.socket.unlink(missing_ok=True)
        log = open(self.folder / "log", "ab")
        self.child = subprocess.Popen([str(w) for w in self.argv()], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        end = time.monotonic() + PATIENCE
        while not self.socket.is_socket():
            if self.child.poll() is not None or time.monotonic() > end:
                sys.exit(f"{self.name} does not start\n{(self.folder / 'log').read_text(errors='replace')}")
            time.sleep(0.02)

    def stop(self):
        """Stops it."""
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        self.child = None

    def cpu(self):
        """Seconds of processors so far, to the nanosecond, of threads that have ended, too: the clock of the process (see clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.child.pid << 3) | 2)

    def uri(self):
        """What clients connect to."""
        return f"nbd+unix:///?socket={self.socket}"

    def snapshot(self):
        """Makes a snapshot."""

    def drop_snapshot(self):
        """Drops it."""


class ThinServe(Server):
    name = "thin_serve"
    has_snapshots = True

    def argv(self):
        pool = ["--metadata", self.folder / "meta", "--data", self.folder / "data", "--create", "--data-size", "24g", "--thin", f"0:{EXPORT}"]
        where = ["--nbd", f"unix:{self.socket}", "--control", self.folder / "control"]
        return [self.args.ours, "thin_serve", *pool, *where, *(["--direct"] if self.args.direct else [])]

    def ask(self, *words):
        run_quietly([self.args.ours, "thin_ctl", "--socket", self.folder / "control", *words])

    def snapshot(self):
        self.ask("create_snap", "1", "0")

    def drop_snapshot(self):
        self.ask("delete", "1")


class Nbdkit(Server):
    name = "nbdkit file"

    def argv(self):
        run_quietly(["truncate", "-s", EXPORT.upper(), self.image])
        return ["nbdkit", "-f", "-U", self.socket, "file", self.image]


class QemuNbd(Server):
    format = ""

    def argv(self):
        if not self.image.exists():
            run_quietly(["qemu-img", "create", "-q", "-f", self.format, self.image, EXPORT])
        how = ["--cache=none", "--aio=io_uring"] if self.args.direct else ["--cache=writeback", "--aio=threads"]
        return ["qemu-nbd", "-t", "-e", "8", "-k", self.socket, "-f", self.format, *how, "--discard=unmap", self.image]


class Raw(QemuNbd):
    name = "qemu-nbd raw"
    format = "raw"


class Qcow2(QemuNbd):
    name = "qemu-nbd qcow2"
    format = "qcow2"
    has_snapshots = True

    def between(self, *words):
        self.stop()
        run_quietly(["qemu-img", "snapshot", *words, self.image])
        self.start()

    def snapshot(self):
        self.between("-c", "before")

    def drop_snapshot(self):
        self.between("-d", "before")


def busy():
    """Seconds that all processors have worked since the start of the machine."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def client_cpu():
    """Seconds of processors of the clients so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fio(server, words):
    """Runs a job; what it says of it."""
    said = run_quietly(["fio", "--name=job", "--ioengine=nbd", f"--uri={server.uri()}", "--output-format=json", "--randrepeat=0", *words])
    return json.loads(said[said.index("{") :])["jobs"][0]


def fill(server, part):
    """Writes all of a part."""
    fio(server, ["--rw=write", "--bs=1m", "--iodepth=4", "--refill_buffers", "--end_fsync=1", *region(*part)])


class Measured:
    """What one run of a job was: requests a second, microseconds of the server's processors for each, its slowest hundredth, others' load."""

    def __init__(self, server, words):
        before = server.cpu(), busy(), client_cpu(), time.monotonic()
        job = fio(server, words)
        after = server.cpu(), busy(), client_cpu(), time.monotonic()
        cpu, all_cpu, own, wall = (b - a for a, b in zip(before, after))
        kind = max(("read", "write", "trim"), key=lambda kind: job[kind]["total_ios"])
        self.rate = job[kind]["iops"]
        self.cpu = cpu / job[kind]["total_ios"] * 1e6
        self.late = job[kind]["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1e3
        self.others = max(0.0, all_cpu - cpu - own) / wall


def measure(args, servers):
    """All jobs on all servers in turn; the runs by job and server."""
    wanted = [job for job in jobs() if not args.jobs or job.name in args.jobs.split()]
    runs = {}
    for run in range(args.runs):
        # Each is the first at times.
        for server in servers[run % len(servers) :] + servers[: run % len(servers)]:
            for job in wanted:
                is_break = job.name == "break"
                if is_break and not server.has_snapshots:
                    continue
                if is_break:
                    server.snapshot()
                if job.name == "trim" and "fill" not in (args.jobs or "fill"):
                    fio(server, next(j for j in jobs() if j.name == "fill").words(run))
                timed = [] if job.is_sized else ["--time_based", f"--runtime={args.seconds}"]
                runs.setdefault((job.name, server.name), []).append(Measured(server, job.words(run) + timed))
                if is_break:
                    server.drop_snapshot()
                    # Else the first writes of the next turn would break the sharing of what that snapshot had.
                    fill(server, MAPPED)
                print(f"{run} {server.name} {job.name} {runs[job.name, server.name][-1].__dict__}", file=sys.stderr)
    return wanted, runs


def median(runs, of):
    """The median of something of all runs."""
    return statistics.median(of(run) for run in runs)


def ratio(ours, theirs, of):
    """The median of the ratios of runs that followed each other."""
    return f"{statistics.median(of(a) / of(b) for a, b in zip(ours, theirs)):.2f}"


def report(servers, wanted, runs):
    """Prints what was measured."""
    ours, peers = servers[0].name, [server.name for server in servers[1:]]
    print("| job | expected | " + " | ".join(server.name for server in servers) + " | " + " | ".join(f"of {peer}" for peer in peers) + " | CPU of nbdkit's |")
    print("|---|---|" + "--:|" * (len(servers) + len(peers) + 1))
    for job in wanted:
        cells = [job.text, job.expected]
        own = runs[job.name, ours]
        for server in servers:
            found = runs.get((job.name, server.name))
            cells.append(f"{median(found, lambda r: r.cpu):.1f} µs, {median(found, lambda r: r.rate) / 1000:.1f} k/s" if found else "")
        for peer in peers:
            found = runs.get((job.name, peer))
            cells.append(ratio(own, found, lambda r: r.rate) if found else "")
        nbdkit = runs.get((job.name, Nbdkit.name))
        cells.append(ratio(own, nbdkit, lambda r: r.cpu) if nbdkit else "")
        print("| " + " | ".join(cells) + " |")
    others = [run.others for found in runs.values() for run in found]
    print(f"\nOthers kept {statistics.median(others):.2f} cores busy meanwhile (median; {max(others):.2f} at most).", flush=True)


def main():
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for images and sockets")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--jobs")
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--ours", type=Path, required=True)
    args = parser.parse_args()
    if not 1 <= args.runs <= 14:
        parser.error("1 to 14 runs are possible")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    kind = run_quietly(["stat", "-f", "-c", "%T", args.folder]).strip()
    system = f"{platform.system()} {platform.release()}, {len(os.sched_getaffinity(0))} cores"
    print(f"{system}, load {os.getloadavg()[0]:.2f} when this began, files on {kind}{', O_DIRECT' if args.direct else ''}; median of {args.runs}.\n")
    servers = [kind(args) for kind in (ThinServe, Nbdkit, Raw, Qcow2)]
    try:
        for server in servers:
            server.start()
            for part in (MAPPED, SHARED):
                fill(server, part)
        wanted, runs = measure(args, servers)
    finally:
        for server in servers:
            server.stop()
    report(servers, wanted, runs)


if __name__ == "__main__":
    sys.exit(main())
