//! `thin_serve`: a thin pool without the kernel, its devices served to NBD clients and as files.

mod child;
mod new_pool;
mod ready;
mod run;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use thintools::runtime::Autoextend;
use thintools::units::{MAX_THIN_ID, ThinId, is_legal_data_block_size};

use super::Page;
use super::replay::sectors;

pub(crate) use run::run;

/// The name of the command.
pub(crate) const NAME: &str = "thin_serve";

/// What the command does, in one line.
pub(crate) const TITLE: &str =
    "Serve the thin devices of a pool to NBD clients and as files, without the kernel";

/// The text of the manual page.
pub(crate) const PAGE: Page = Page {
    description: &[
        "thin_serve runs a thin pool in user space, on the metadata and data devices, or files, that \
         the kernel would use, and serves its thin devices to NBD clients. What it writes is what the \
         kernel would have written: a pool may be used by one today and by the other tomorrow, but \
         not by both at once. Devices are opened exclusively, files are locked.",
        "It stays in the foreground until SIGTERM, SIGINT or SIGHUP; then it commits, and ends with \
         status 0. Requests have a second to end by themselves; those that wait for space, or for a \
         resume, fail then. A second signal ends it at once, which loses what was not flushed, as a crash \
         would, and no more.",
        "Without --thin every thin device of the pool is exported under its id, those included that \
         are made later; it ends with its last mapped block. With --thin the devices that are named \
         are exported, with the size that is given. A client that names no export gets the only one.",
        "A flush, and a write with FUA, is answered when data and metadata are durable; flushes at \
         the same time share one commit, and one that finds no mapping changed flushes the data \
         device only. A write that needs a block when there is none fails at once with ENOSPC, unless \
         --queue-when-full says for how long it waits. With --autoextend it waits for 60 seconds by itself, for clients may write \
         faster than files grow.",
    ],
    sections: &[
        (
            "WHAT IS REFUSED",
            &[
                "Metadata that needs a check, or whose superblock or space maps cannot be used; a data \
                 device that is smaller than the pool; metadata and data given the wrong way round. With \
                 --check all of the metadata is checked first, as thin_check does. A device that is \
                 larger than the pool is used at once.",
                "--create makes only what is not there, and takes a pool as it is: --block-size has to be that of the pool, and \
                 --data-size changes no file that exists, which is told. A new pool that cannot be served, for instance since its \
                 data has more than 2^40 blocks, is not left behind, nor are files that were made for it.",
                "--read-only opens both devices to read, and never writes anything. It serves metadata \
                 that needs a check or is damaged, see RESCUE.",
            ],
        ),
        (
            "RESCUE",
            &[
                "With --read-only a block is served if its leaf of the mapping tree is whole, and it is known where that belongs. What is \
                 lost is an I/O error, never zeros, so that a copy tells what is missing (qemu-img convert --salvage, or ddrescue on a file of \
                 --fuse, go on behind it). Space maps and device details are not needed. A block of metadata with one wrong bit is read as \
                 it was.",
                "At the start the inner nodes of all mapping trees are read, one block of metadata in a hundred and more. Where one of them, the root \
                 of a device, the superblock or a part of the top-level tree is lost, all of the metadata is read, and what they led to is looked for as \
                 thin_repair does; what was found and guessed is printed, and stands in a temporary file ($TMPDIR). What may belong to \
                 several devices is left out and an I/O error, as thin_repair leaves it out without --include-ambiguous. Blocks that are not \
                 mapped are zeros only if nothing can be missing there: in whole leaves, and, below a lost node, if a device has as many \
                 mappings as its details say. Without a superblock the size of data blocks is needed: --block-size. Devices of which \
                 the details alone are left are exported, too, and all errors.",
                "A device without --thin ID:SIZE ends with the last block that is known to be mapped; where the end of its tree \
                 is lost, that is the first block that is, and an event, size_unknown, says so. A leaf whose contents were written to the \
                 wrong place is looked for only if something else is lost; thin_repair into a new file finds it in any case. But what is lost \
                 after a repair reads as zeros.",
            ],
        ),
        (
            "DIRECT I/O",
            &[
                "The data device is used through the page cache, unless --direct is given: then O_DIRECT leaves the memory to others, and a \
                 disk gets as many requests at once as clients have under way, through io_uring, or with threads where the kernel \
                 has no io_uring for this process. A single request at a time takes longer than one of the page cache. Clients need \
                 not align anything; requests that are not whole sectors of the device are slower. A data file on a file system that \
                 takes no direct I/O is refused.",
            ],
        ),
        (
            "READINESS",
            &[
                "Clients can connect once READY=1 was sent to the socket in NOTIFY_SOCKET, as systemd \
                 expects it of Type=notify; once a line was written to the descriptor of --ready-fd; \
                 or, with --run, when the command runs. Sockets in LISTEN_FDS are served, so that \
                 socket activation works, that of libnbd included.",
                "--run CMD runs CMD with sh when clients can connect, with the URI of the first export in \
                 $uri, the path of the socket in $unixsocket and the folder of --fuse in $fuse, and ends with its status when it ends. \
                 Without --nbd it makes a socket in a folder of its own.",
                "A signal ends the command, too, before the server stops: the command and all that it has started get SIGTERM, \
                 three seconds later SIGHUP, of which interactive shells take notice, and after three more SIGKILL. Where there is a \
                 terminal, the command shares it with the server, and its Ctrl-C reaches both. What has to be undone, such as a mount, is so \
                 if the command heeds signals.",
            ],
        ),
        (
            "FILES",
            &[
                "With --fuse each thin device that is exported is a sparse file, named by its id, in a folder that has to be \
                 empty. It can be used at the same time as over NBD, and whatever is written is seen on all ways at once: the \
                 kernel keeps no copy. A loop device makes a disk of it: losetup --direct-io=on. Only the user who runs the \
                 server may use the files, and root may if that is the user; who is not root needs fusermount3.",
                "A file has the size of its device, and cannot be truncated; to open it with O_TRUNC changes nothing, as with a \
                 block device. fsync, and writing with O_SYNC or O_DSYNC, make durable; closing does not. Punching a hole makes \
                 it read as zeros, and frees its whole blocks; zeroing a range keeps them. SEEK_DATA \
                 and SEEK_HOLE, and the blocks that stat(2) counts, tell what is mapped. Files can be mapped privately only \
                 (MAP_PRIVATE). Writing past the end, or when the pool is full, fails with ENOSPC; with --read-only opening to \
                 write fails with EROFS. A device whose file is open is in use.",
                "With skip_block_zeroing, ignore_discard or --origin zeros give no space back: punching a hole fails with EOPNOTSUPP, and \
                 with it fstrim over a loop device, but zeroing a range works. fallocate(2) without a mode fails in the same way: a \
                 thin device has no space for what is not written. posix_fallocate(3) writes to each block then, which gives it space.",
                "df shows the pool: its data blocks, of which all files have theirs, and as inodes the ids that thin devices can \
                 have.",
                "When the server stops, files that are still open have a few seconds, or one if writes wait for space; then \
                 their I/O fails. So unmount file systems and detach loop devices first. What a server that was killed has \
                 left mounted on the folder is unmounted by the next one. Without --nbd the server ends when the folder is \
                 unmounted.",
            ],
        ),
        (
            "CLIENTS",
            &[
                "Up to 256 NBD clients can have an export open, and 64 more can be about to; of those the one \
                 that has been for longest gives way to the next, and each has 30 seconds. However many there \
                 are and whatever they do, requests and replies take up to 256 MiB of memory. Of that 256 KiB \
                 are each client's own, which is enough for any request; a client that does not take its \
                 replies, or does not send its data, holds up nobody else.",
                "NBD over TCP is for loopback addresses. With --tls-certificates clients that ask for it get TLS, \
                 and other addresses are possible, on which every client has to ask for it. The folder has \
                 server-cert.pem and server-key.pem, as nbdkit and QEMU have them; with --tls-verify-peer clients \
                 have to show a certificate that one in its ca-cert.pem has signed. Without, whoever comes may \
                 read and write.",
            ],
        ),
        (
            "CONTROL",
            &[
                "With --control a socket takes the messages that dmsetup sends to a pool, and more; \
                 thin_ctl --socket speaks to it. Each line is a JSON object whose member command is \
                 message (with message: the words), status or table (with thin: an id, or without for \
                 the pool), suspend, resume (features: words), resize (data, metadata: blocks), \
                 activate (thin, size in bytes, origin), deactivate (thin), exported, events (after: a \
                 number), stats or metrics. The answer is {\"ok\": ...} or {\"error\": {\"errno\": ..., \
                 \"message\": ...}}. Only the owner of the socket may use it.",
                "A device that clients use cannot be deleted or deactivated. A snapshot of one waits \
                 until its I/O under way has ended, and holds back what comes meanwhile.",
            ],
        ),
        (
            "CONTEXTS",
            &[
                "NBD clients can ask which bytes have which status, in these contexts: base:allocation: 0 \
                 mapped, or read from an external origin; 3 not mapped. qemu:allocation-depth: 0 not mapped; \
                 1 mapped, and nobody else has the block; 2 shared, or read from an external origin. \
                 qemu:dirty-bitmap:since-ID: 1 mapped otherwise than in thin device ID, else 0. \
                 dm-thin:time: the snapshot clock when the block was mapped; 4294967295 not mapped. \
                 dm-thin:shared: 1 somebody else has the block, too; else 0.",
                "A client of dirty bitmaps thus backs up what changed since a snapshot. \
                 src/lib/runtime/NBD.md in the sources lists exactly which parts of the protocol there are.",
            ],
        ),
        (
            "SIZES",
            &[
                "Sizes are numbers with s for sectors of 512 bytes, k, m, g or t; without a letter, bytes.",
            ],
        ),
    ],
    examples: &[
        (
            "Make a pool of 100 GiB in two files, with a thin device of 1 TiB, and serve it:",
            &[
                "thin_serve --metadata meta --data data --create --data-size 100g --thin 0:1t --nbd unix:/run/pool.sock",
            ],
        ),
        (
            "Mount the file system on thin device 0 until the end of a shell:",
            &[
                "thin_serve --metadata meta --data data --fuse dir --run 'trap : TERM HUP; mount -o loop $fuse/0 /mnt && bash; umount /mnt'",
            ],
        ),
        (
            "Copy a device out of a pool that the kernel refuses:",
            &[
                "thin_serve --read-only --metadata tmeta --data tdata --thin 7 --run 'nbdcopy \"$uri\" saved.img'",
            ],
        ),
        (
            "Grow the files by a fifth whenever four fifths are in use:",
            &[
                "thin_serve --metadata meta --data data --autoextend 80:20 --nbd tcp:127.0.0.1:10809",
            ],
        ),
    ],
    files: &[],
    see_also: &[
        ("losetup", "8"),
        ("fusermount3", "1"),
        ("nbdinfo", "1"),
        ("nbdcopy", "1"),
        ("qemu-nbd", "8"),
        ("dmsetup", "8"),
    ],
};

/// Sectors of the smallest data blocks, which new pools have.
const LEAST_BLOCK: u32 = 128;

/// Seconds for which writes wait for a pool that grows by itself, as long as the kernel lets them.
const GROWTH: u64 = 60;

/// The command line.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("kind").args(["create", "read_only"])))]
pub(crate) struct Args {
    /// The metadata device or file.
    #[arg(long, value_name = "META")]
    metadata: PathBuf,

    /// The data device or file.
    #[arg(long, value_name = "DATA")]
    data: PathBuf,

    /// Serve NBD on a socket: unix:PATH, or tcp:ADDRESS:PORT. May be given several times.
    #[arg(long, value_name = "WHERE", value_parser = nbd)]
    nbd: Vec<Nbd>,

    /// Offer TLS to NBD clients, with server-cert.pem and server-key.pem of this folder. Needs a build with the cargo feature tls.
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,

    /// Let in whom a certificate in ca-cert.pem of the folder of --tls-certificates has signed, and nobody else.
    #[arg(long, requires = "tls_certificates")]
    tls_verify_peer: bool,

    /// Serve the thin devices as files in this folder, which has to be empty.
    #[arg(long, value_name = "DIR")]
    fuse: Option<PathBuf>,

    /// Serve the control socket at this path.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Export this thin device, with this size. May be given several times.
    #[arg(long, value_name = "ID[:SIZE]", value_parser = thin)]
    thin: Vec<(ThinId, Option<u64>)>,

    /// What was never written to this thin device is read from this file or device; behind its last byte are zeros.
    #[arg(long, value_name = "ID=FILE", value_parser = origin, requires = "thin")]
    origin: Vec<(ThinId, PathBuf)>,

    /// Read and write the data device past the page cache (O_DIRECT), with io_uring where the kernel lets.
    #[arg(long)]
    direct: bool,

    /// Write nothing, and serve what can be read.
    #[arg(long, conflicts_with_all = ["create", "autoextend", "queue_when_full"])]
    read_only: bool,

    /// Check all of the metadata first.
    #[arg(long)]
    check: bool,

    /// Make what is not there: the pool, its metadata file, its data file if --data-size is given, and the devices of --thin.
    #[arg(long)]
    create: bool,

    /// With --create: the size of data blocks, a multiple of 64k up to 1g [default: 64k]. With --read-only: their size, if the superblock is lost.
    #[arg(long, value_name = "SIZE", value_parser = block_size, requires = "kind")]
    block_size: Option<u32>,

    /// With --create: the size of a data file that is not there.
    #[arg(long, value_name = "SIZE", value_parser = sectors, requires = "create")]
    data_size: Option<u64>,

    /// Tell an event when no more than this many data blocks are free.
    #[arg(long, value_name = "N", default_value_t = 0)]
    low_water: u64,

    /// A feature word of the pool's table: skip_block_zeroing, ignore_discard, no_discard_passdown, read_only.
    #[arg(long, value_name = "WORD")]
    feature: Vec<String>,

    /// Let writes wait for space for this long before they fail; 0 is for ever. Without, they fail at once, or after 60 seconds where files grow by themselves
    #[arg(long, value_name = "SECONDS")]
    queue_when_full: Option<u64>,

    /// Grow the backing files by PERCENT of their size when THRESHOLD percent are in use.
    #[arg(long, value_name = "THRESHOLD:PERCENT", value_parser = autoextend)]
    autoextend: Option<Autoextend>,

    /// Keep up to this much metadata in memory.
    #[arg(long, value_name = "SIZE", default_value = "64m", value_parser = sectors)]
    metadata_cache: u64,

    /// Write a line to this file descriptor when clients can connect.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    ready_fd: Option<RawFd>,

    /// Run this command with sh when clients can connect, and end with it.
    #[arg(long, value_name = "CMD")]
    run: Option<String>,

    /// Have something go wrong: DEVICE:REQUEST:ACTION[:CONDITION,...]. DEVICE: data, metadata or any. REQUEST: read, write, zero, discard,
    /// flush or any. ACTION: eio, enospc, delay=MS, off (no power) or kill. CONDITION: nth=N, from=N, at=BYTE+LEN, while=PATH, chance=PERCENT,
    /// seed=N; README.md explains them. May be given several times.
    #[cfg(feature = "devtools")]
    #[arg(long, value_name = "FAULT", help_heading = crate::commands::DEVTOOLS)]
    fault: Vec<thintools::runtime::Fault>,

    /// Print nothing but errors.
    #[arg(short, long)]
    quiet: bool,
}

/// Where NBD is served.
#[derive(Clone, Debug)]
enum Nbd {
    Unix(PathBuf),
    Tcp(String),
}

fn nbd(text: &str) -> Result<Nbd, String> {
    match text.split_once(':') {
        Some(("unix", path)) if !path.is_empty() => Ok(Nbd::Unix(path.into())),
        Some(("tcp", address)) if address.contains(':') => Ok(Nbd::Tcp(address.into())),
        _ => Err("neither unix:PATH nor tcp:ADDRESS:PORT".into()),
    }
}

fn id(text: &str) -> Result<ThinId, String> {
    match text.parse() {
        Ok(id) if id <= MAX_THIN_ID => Ok(ThinId(id)),
        _ => Err(format!(
            "{text:?} is no device id; 0 to {MAX_THIN_ID} are possible"
        )),
    }
}

fn thin(text: &str) -> Result<(ThinId, Option<u64>), String> {
    match text.split_once(':') {
        Some((number, size)) => Ok((id(number)?, Some(sectors(size)? * 512))),
        None => Ok((id(text)?, None)),
    }
}

fn origin(text: &str) -> Result<(ThinId, PathBuf), String> {
    let (number, path) = text.split_once('=').ok_or("not ID=FILE")?;
    Ok((id(number)?, path.into()))
}

fn block_size(text: &str) -> Result<u32, String> {
    match u32::try_from(sectors(text)?) {
        Ok(size) if is_legal_data_block_size(size) => Ok(size),
        _ => Err("a multiple of 64k from 64k to 1g is possible".into()),
    }
}

fn autoextend(text: &str) -> Result<Autoextend, String> {
    let parsed = text.split_once(':').and_then(|(threshold, percent)| {
        let how = Autoextend {
            threshold: threshold.parse().ok()?,
            percent: percent.parse().ok()?,
        };
        ((1..=100).contains(&how.threshold) && how.percent > 0).then_some(how)
    });
    parsed.ok_or_else(|| {
        "two numbers: percent in use, 1 to 100, and percent to grow by, 1 to 65535".into()
    })
}

impl Args {
    /// Sectors in a block of a pool that is made.
    fn new_block_size(&self) -> u32 {
        self.block_size.unwrap_or(LEAST_BLOCK)
    }

    /// For how long writes wait for space, if they do; within, none is for ever.
    fn patience(&self) -> Option<Option<Duration>> {
        let while_growing = self.autoextend.map(|_| GROWTH);
        let seconds = self.queue_when_full.or(while_growing)?;
        Some((seconds > 0).then(|| Duration::from_secs(seconds)))
    }
}

/// Makes the parser of the command line.
pub(crate) fn build() -> clap::Command {
    super::tool(
        <Args as clap::Args>::augment_args(clap::Command::new(NAME)),
        TITLE,
        &PAGE,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_at_their_edges() {
        assert_eq!(thin("16777215:1g"), Ok((ThinId(16_777_215), Some(1 << 30))));
        assert_eq!(thin("0"), Ok((ThinId(0), None)));
        for bad in ["", "x", "16777216", "1:", "1:7", "-1"] {
            assert!(thin(bad).is_err(), "{bad}");
        }
        assert_eq!(
            (block_size("64k"), block_size("1g")),
            (Ok(128), Ok(2_097_152))
        );
        for bad in ["0", "32k", "65k", "2g"] {
            assert!(block_size(bad).is_err(), "{bad}");
        }
        assert!(autoextend("80:20").is_ok());
        for bad in ["80", "0:20", "101:20", "80:0", "80:20:1"] {
            assert!(autoextend(bad).is_err(), "{bad}");
        }
        for bad in ["", "unix:", "tcp:10809", "file"] {
            assert!(nbd(bad).is_err(), "{bad}");
        }
        assert_eq!(origin("3=a=b"), Ok((ThinId(3), "a=b".into())));
    }
}
