#!/usr/bin/env python3
"""Holds what thintools writes against the real kernel: hold.py THINTOOLS FOLDER.

Images that a kernel wrote are changed by thin_ctl, or damaged and repaired; the kernel in a virtual machine then activates them, reads
what is mapped and goes on writing; and what it leaves is checked, and changed once more. THINTOOLS is a build with devtools.
"""
import os, random, shutil, subprocess, sys, xml.sax
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent.parent / "testdata" / "kernel"
TOOL, FOLDER = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
CHANGED = ["snap-mix-a", "held-root", "snap-fan-60", "rand-600thins-5", "resize", "bs-512", "snap-chain-20"]
MAPS = ["metadata-index", "metadata-bitmap", "metadata-counts", "data-index", "data-bitmap", "data-counts"]
REPAIRED = [
    ("snap-mix-a", ["superblock:zero"]), ("held-root", ["superblock:junk"]), ("bs-1gib", ["superblock:torn"]),
    ("rand-20thins-10k", ["top-level-root:zero"]), ("snap-chain-20", ["top-level-root:junk"]), ("rand-600thins-5", ["top-level:zero:2"]),
    ("snap-mix-b", ["details:zero"]), ("snap-fan-60", ["inner:zero"]), ("rand-1thin-70k", ["inner:zero:1/4"]),
    ("crash-log", [m + ":zero:all" for m in MAPS]), ("bs-512", ["any:junk:5"]), ("rand-20thins-10k", ["any:swapped:5"]),
    ("resize", ["superblock:zero"] + [m + ":junk:all" for m in MAPS]),
]


class Dump(xml.sax.ContentHandler):
    """Mapped runs of each device of a dump."""

    def __init__(self):
        super().__init__()
        self.devices, self.definitions, self.runs, self.superblock = {}, {}, None, {}

    def startElement(self, name, attributes):
        number = lambda key: int(attributes[key])
        if name == "superblock":
            self.superblock = dict(attributes.items())
        elif name == "def":
            self.runs = self.definitions.setdefault(attributes["name"], [])
        elif name == "device":
            self.runs = self.devices.setdefault(number("dev_id"), [])
        elif name == "ref":
            self.runs += self.definitions[attributes["name"]]
        elif name == "single_mapping":
            self.runs.append((number("origin_block"), 1))
        elif name == "range_mapping":
            self.runs.append((number("origin_begin"), number("length")))


def tool(*args, codes=(0,)):
    done = subprocess.run([TOOL, *map(str, args)], capture_output=True, text=True)
    if done.returncode not in codes:
        sys.exit(f"{args} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def dump(path):
    handler = Dump()
    xml.sax.parseString(tool("thin_dump", path).encode(), handler)
    return handler


def checked(path):
    """Nothing is wrong, by us and by Debian's tools where they are."""
    tool("thin_check", "-q", path)
    if os.path.exists("/usr/sbin/thin_check"):
        subprocess.run(["/usr/sbin/thin_check", "-q", path], check=True)


def expand(name, to):
    with open(to, "wb") as out:
        subprocess.run(["zstd", "-dqc", IMAGES / name / "meta.img.zst"], stdout=out, check=True)


def changed(name, path, seed):
    expand(name, path)
    draw = random.Random(seed)
    pool = dump(path)
    ids, transaction = sorted(pool.devices), int(pool.superblock["transaction"])
    ctl = lambda *args: tool("thin_ctl", path, *args)
    ctl("create-thin", 9000)
    for i, origin in enumerate(draw.sample(ids, min(5, len(ids)))):
        ctl("create-snap", 9100 + i, origin)
    for gone in draw.sample(ids, min(4, len(ids) - 1)):
        ctl("delete", gone)
    ctl("create-snap", 9200, 9100)
    ctl("set-transaction-id", transaction, transaction + 3)
    ctl("release-metadata-snap" if name == "held-root" else "reserve-metadata-snap")


def repaired(name, specs, path, seed):
    whole, damaged = f"{path}.whole", f"{path}.damaged"
    expand(name, whole)
    args = [word for spec in specs for word in ("--damage", spec)]
    tool("thin_generate_damage", "-i", IMAGES / name / "meta.img.zst", "-o", damaged, *args, "--seed", seed)
    fields = dump(whole).superblock
    hints = ["--data-block-size", fields["data_block_size"], "--nr-data-blocks", fields["nr_data_blocks"], "--transaction-id", fields["transaction"]]
    with open(path, "wb") as out:
        out.truncate(os.path.getsize(whole))
    is_lost = any(spec.startswith("superblock") for spec in specs)
    tool("thin_repair", "-q", "-i", damaged, "-o", path, *(hints if is_lost else []), codes=(0, 4))
    os.remove(whole)
    os.remove(damaged)


def expect(path, number, share):
    """Tells the guest what it should find."""
    pool, draw = dump(path), random.Random(number)
    block_size = int(pool.superblock["data_block_size"])
    mapped = [i for i in sorted(pool.devices) if pool.devices[i]]
    draw.shuffle(mapped)
    lines = []
    for device in mapped[:5]:
        runs = pool.devices[device]
        edges = [b for b, n in runs] + [b + n - 1 for b, n in runs]
        size = min((max(edges) + 1) * block_size, 1 << 40)
        some = sorted(b for b in set(edges) if (b + 1) * block_size <= size)
        draw.shuffle(some)
        lines.append(f"{device} {size} {sum(n for _, n in runs) * block_size} {','.join(map(str, some[:12]))}\n")
    fresh = next(i for i in range(1, 9999) if i not in pool.devices)
    rest = [i for i in sorted(pool.devices) if i not in mapped[:5]]
    values = {
        "BS": block_size,
        "SIZE": int(pool.superblock["nr_data_blocks"]) * block_size,
        "TRANS": pool.superblock["transaction"],
        "FRESH": fresh,
        "DEL": rest[0] if rest else "",
    }
    (share / f"{number}.cfg").write_text("".join(f"{k}={v}\n" for k, v in values.items()))
    (share / f"{number}.thins").write_text("".join(lines))


def main():
    share = FOLDER / "share"
    share.mkdir()
    paths = []
    for name in CHANGED:
        paths.append(FOLDER / f"{len(paths)}.img")
        changed(name, paths[-1], len(paths))
    for name, specs in REPAIRED:
        paths.append(FOLDER / f"{len(paths)}.img")
        repaired(name, specs, paths[-1], len(paths))
    for number, path in enumerate(paths):
        checked(path)
        expect(path, number, share)
    statuses = {n: tool("thin_ctl", p, "status").split() for n, p in enumerate(paths)}
    bad = 0
    for first in range(0, len(paths), 10):
        some = range(first, min(first + 10, len(paths)))
        disks = [word for n in some for word in ("--disk", str(paths[n]))]
        cases = "CASES=" + " ".join(map(str, some))
        shutil.copy(HERE / "guest.sh", share / "guest.sh")
        command = [HERE / "run-in-kernel", *disks, "--share", share, "--env", cases, "--timeout", "900", share / "guest.sh"]
        done = subprocess.run(command, capture_output=True, text=True)
        results = [line for line in done.stdout.replace("\r", "").split("\n") if line.startswith(("RESULT", "STATUS"))]
        for line in results:
            words = line.split()
            if words[0] == "STATUS":
                # Transaction id, metadata, data, metadata snapshot and mode are what thin_ctl says, too.
                if words[5:10] != statuses[int(words[1])][:5]:
                    bad += 1
                    print(f"other status: {line}; thin_ctl: {statuses[int(words[1])]}")
            else:
                bad += "bad=0" not in words
                print(line)
        if not results and done.returncode in (124, 125):
            print(f"SKIPPED: the real kernel was not asked, since the machine does not start here: {done.stderr.strip()[-300:]}")
            return
        if len(results) != 2 * len(some):
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
            sys.exit(f"the machine ended with {done.returncode}, and said of {len(results)} results")
    for path in paths:
        checked(path)
        tool("thin_ctl", path, "create-thin", 77777)
        tool("thin_ctl", path, "create-snap", 77778, 77777)
        tool("thin_ctl", path, "delete", 77777)
        checked(path)
    if bad:
        sys.exit(f"{bad} images are not as they should be")
    print(f"{len(paths)} images of thintools were activated, read and changed by the kernel, and changed again by thintools")


main()
