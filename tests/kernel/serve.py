#!/usr/bin/python3
"""Holds what thin_serve serves against the real kernel, in one virtual machine: serve.py THINTOOLS FOLDER.

A pool that was written through NBD, with snapshots and devices with an external origin, is activated by the kernel, which finds the
same content and goes on writing; thin_serve finds what it wrote. A pool of the same kind that the kernel made is served with the same
content. Meanwhile the kernel uses exports through its nbd module, as disks; the server is killed then, and what was flushed is there.
"""
import hashlib, os, random, shutil, signal, socket, subprocess, sys
from pathlib import Path

import nbd

HERE = Path(__file__).resolve().parent
TOOL, FOLDER = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
BLOCK = 65536
# Thin device: bytes, and whether it has the external origin.
OURS = {0: (8 << 20, False), 1: (8 << 20, False), 2: (6 << 20, True), 3: (6 << 20, True), 4: (8 << 20, False)}


class Server:
    """A pool that is served until the end of a with statement."""

    def __init__(self, name, *more, listener=None):
        self.control, self.socket = FOLDER / f"{name}.control", FOLDER / f"{name}.nbd"
        command = [TOOL, "thin_serve", "--metadata", FOLDER / f"{name}.meta", "--data", FOLDER / f"{name}.data"]
        command += ["--control", self.control, "--nbd", f"unix:{self.socket}", "--ready-fd", "1", *more]

        given = []
        if listener:
            # As a service manager does: the socket is descriptor 3.
            given = [listener.fileno()]
            command = ["sh", "-c", f'exec 3<&{given[0]}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"', "sh", *command]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=given)
        if self.process.stdout.readline() != b"ready\n":
            sys.exit(f"{name} is not served")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end(signal.SIGTERM)

    def end(self, number):
        self.process.send_signal(number)
        self.process.wait(60)

    def ctl(self, *words):
        subprocess.run([TOOL, "thin_ctl", "--socket", self.control, *map(str, words)], check=True)

    def connect(self, thin):
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///{thin}?socket={self.socket}")
        return handle

    def content(self, thin):
        handle = self.connect(thin)
        size = handle.get_size()
        return b"".join(handle.pread(min(1 << 20, size - at), at) for at in range(0, size, 1 << 20))


def activations(thins):
    """Options that export thin devices with their sizes and origins."""
    words = []
    for thin, (size, has_origin) in thins.items():
        words += ["--thin", f"{thin}:{size}"] + (["--origin", f"{thin}={FOLDER / 'origin'}"] if has_origin else [])
    return words


def scribble(server, thin, seed, count):
    """Writes of all lengths, zeros, and discards where there is no origin that would come to light."""
    draw, handle = random.Random(seed), server.connect(thin)
    size, has_origin = OURS[thin]
    for _ in range(count):
        length = draw.choice([512, 4096, 4096, BLOCK, 200 * 512, 3 * BLOCK])
        at = draw.randrange((size - length) // 512) * 512
        kind = draw.randrange(8)
        if kind == 0:
            handle.zero(length, at)
        elif kind == 1 and not has_origin:
            handle.trim(length, at)
        else:
            handle.pwrite(draw.randbytes(length), at)
    handle.flush()


def write_ours():
    first = {thin: OURS[thin] for thin in (0, 2)}
    with Server("ours", "--create", "--data-size", "64m", *activations(first)) as server:
        origin = FOLDER / "origin"
        scribble(server, 0, 1, 60)
        scribble(server, 2, 2, 30)
        server.ctl("create_snap", 1, 0)
        server.ctl("create_snap", 3, 2)
        server.ctl("activate", 1, OURS[1][0])
        server.ctl("activate", 3, OURS[3][0], origin)
        for thin in (0, 1, 2, 3):
            scribble(server, thin, 10 + thin, 25)
        server.ctl("create_snap", 4, 1)
        scribble(server, 1, 20, 20)


def sums(name, thins):
    subprocess.run([TOOL, "thin_check", "-q", FOLDER / f"{name}.meta"], check=True)
    with Server(name, "--read-only", *activations(thins)) as server:
        return {thin: hashlib.sha256(server.content(thin)).hexdigest() for thin in thins}


def main():
    draw = random.Random(7)
    # It ends within a block of the pool.
    (FOLDER / "origin").write_bytes(draw.randbytes((4 << 20) + 5 * 512))
    share = FOLDER / "share"
    share.mkdir()
    noise = draw.randbytes(100 * BLOCK)
    (share / "random").write_bytes(noise)
    thins = [f"{thin} {size // 512}{' /dev/vdc' * has_origin}\n" for thin, (size, has_origin) in OURS.items()]
    (share / "thins").write_text("".join(thins))
    write_ours()
    expected = {"ours": sums("ours", OURS)}
    for name, size in (("kernels.meta", 2 << 20), ("kernels.data", 64 << 20)):
        with open(FOLDER / name, "wb") as made:
            made.truncate(size)

    listener = socket.create_server(("127.0.0.1", 0))
    disks = Server("disks", "--create", "--data-size", "96m", "--thin", "0:48m", "--thin", "1:16m", listener=listener)
    names = ("ours.meta", "ours.data", "origin", "kernels.meta", "kernels.data")
    command = [HERE / "run-in-kernel", "--share", share, "--net", "--env", f"NBD={listener.getsockname()[1]}", "--timeout", "900"]
    command += [word for name in names for word in ("--disk", FOLDER / name)]
    command += [word for module in ("nbd", "ext4") for word in ("--module", module)]
    command += [word for program in ("nbd-client", "mkfs.ext4") for word in ("--with", program)]
    try:
        done = subprocess.run([*command, HERE / "serve-guest.sh"], capture_output=True, text=True)
        lines = done.stdout.replace("\r", "").split("\n")
        result = [line for line in lines if line.startswith("RESULT")]
    finally:
        disks.end(signal.SIGKILL)
    if not any(line.startswith("SUM ") for line in lines) and done.returncode in (124, 125):
        print(f"SKIPPED: the real kernel was not asked, since the machine does not start here: {done.stderr.strip()[-300:]}")
        return
    print(*result, sep="\n")
    found = {}
    for _, what, thin, digest in (line.split() for line in lines if line.startswith("SUM ")):
        found.setdefault(what, {})[int(thin)] = digest
    expected["ours-after"] = sums("ours", OURS | {5: OURS[2]})
    expected["kernels"] = sums("kernels", OURS)
    with Server("disks", "--read-only", "--thin", "0:48m", "--thin", "1:16m") as server:
        blocks, image = server.content(1), FOLDER / "image"
        image.write_bytes(server.content(0))
    subprocess.run([TOOL, "thin_check", "-q", FOLDER / "disks.meta"], check=True)
    expected["nbd"] = {1: hashlib.sha256(blocks).hexdigest()}
    wanted = bytearray(16 << 20)
    wanted[3 * BLOCK : 103 * BLOCK] = noise
    wanted[6 * BLOCK : 14 * BLOCK] = bytes(8 * BLOCK)
    wanted[1001 * 512 : 1006 * 512] = noise[: 5 * 512]
    bad = result != ["RESULT bad=0 "]
    bad |= blocks != wanted
    for what in expected:
        for thin in expected[what].keys() | found.get(what, {}).keys():
            ours, kernels = expected[what].get(thin), found.get(what, {}).get(thin)
            if ours != kernels:
                bad = True
                print(f"{what}, thin device {thin}: thin_serve reads {ours}, the kernel {kernels}")
    environment = dict(os.environ, PATH=os.environ["PATH"] + ":/usr/sbin:/sbin")
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True, env=environment)
    subprocess.run(["debugfs", "-R", f"dump /kept {FOLDER / 'kept'}", image], check=True, capture_output=True, env=environment)
    bad |= (FOLDER / "kept").read_bytes() != noise
    if bad:
        print(done.stdout[-3000:], done.stderr[-1000:], sep="\n")
        sys.exit("what thin_serve serves is not what the kernel has")
    count = sum(len(thins) for thins in expected.values())
    print(f"thin_serve and the kernel agree on {count} devices, byte by byte; the kernel's ext4 on an export is whole after kill -9 of the server")


main()
