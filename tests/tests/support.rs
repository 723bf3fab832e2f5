//! What all tests share: running the binary, images made by the kernel, edits with the checksum put right, a small reader of
//! dumps that knows nothing of the library, and pools as plain values to compare.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use thintools::checksum::{self, BlockKind};
use thintools::thin::Fields;
use thintools::units::{BLOCK_SIZE, MetadataBlock};

/// How long a command may take before the test fails.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_thintools");

/// What a command left behind.
#[derive(Clone, Debug)]
pub(crate) struct Finished {
    /// Its exit status; none if a signal ended it.
    pub(crate) code: Option<i32>,
    /// The signal that ended it.
    pub(crate) signal: Option<i32>,
    /// Its standard output.
    pub(crate) stdout: Vec<u8>,
    /// Its standard error.
    pub(crate) stderr: String,
    /// The most memory it was seen to have resident, in KiB.
    pub(crate) peak: u64,
}

impl Finished {
    /// Standard output as text.
    pub(crate) fn out(&self) -> String {
        String::from_utf8(self.stdout.clone()).expect("output is text")
    }

    /// Fails unless the command ended with this status.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "exit status (signal {:?});\nstdout: {}\nstderr: {}",
            self.signal,
            String::from_utf8_lossy(&self.stdout[..self.stdout.len().min(2000)]),
            self.stderr
        );
        self
    }

    /// Fails unless nothing at all was printed.
    #[track_caller]
    pub(crate) fn expect_silent(self) -> Self {
        assert_eq!((self.out().as_str(), self.stderr.as_str()), ("", ""));
        self
    }

    /// Fails unless standard error has all of these texts.
    #[track_caller]
    pub(crate) fn expect_stderr(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(
                self.stderr.contains(text),
                "no {text:?} in stderr: {}",
                self.stderr
            );
        }
        self
    }
}

/// A command that is about to run.
pub(crate) struct Call {
    command: Command,
    input: Vec<u8>,
    timeout: Duration,
}

/// `thintools ARGUMENTS`.
pub(crate) fn thintools<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Call {
    program(BINARY, args)
}

/// `thintools ARGUMENTS` with its address space limited to `mebibytes`.
pub(crate) fn thintools_within<S: AsRef<OsStr>>(
    mebibytes: u64,
    args: impl IntoIterator<Item = S>,
) -> Call {
    let script = format!("ulimit -v {}; exec \"$0\" \"$@\"", mebibytes * 1024);
    let mut call = program("sh", ["-c", &script, BINARY]);
    call.command.args(args);
    call
}

/// Any program; a test fails if it is not installed.
pub(crate) fn program<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Call {
    let mut command = Command::new(name);
    command.args(args).env_remove("TMPDIR");
    Call {
        command,
        input: Vec::new(),
        timeout: TIMEOUT,
    }
}

impl Call {
    /// With these bytes on standard input, through a pipe.
    pub(crate) fn stdin(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// With one more argument.
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// With this environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// With another limit of time.
    pub(crate) fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs it to its end; panics, having killed it, when that takes too long.
    #[track_caller]
    pub(crate) fn run(mut self) -> Finished {
        let shown = format!("{:?}", self.command);
        self.command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.command.spawn().unwrap_or_else(|e| {
            panic!("cannot run {shown}: {e}; tests/run.sh installs what the tests need")
        });
        let mut stdin = child.stdin.take().expect("piped");
        let input = std::mem::take(&mut self.input);
        // A command that does not read its input is no failure of the test.
        thread::spawn(move || drop(stdin.write_all(&input)));
        let stdout = collect(child.stdout.take().expect("piped"));
        let stderr = collect(child.stderr.take().expect("piped"));
        let end = Instant::now() + self.timeout;
        let mut pause = Duration::from_micros(500);
        let mut peak = 0;
        let status = loop {
            peak = peak_of(child.id()).unwrap_or(peak);
            if let Some(status) = child.try_wait().expect("waiting works") {
                break status;
            }
            if Instant::now() > end {
                child.kill().expect("it can be killed");
                child.wait().expect("waiting works");
                panic!("{shown} did not end within {:?}", self.timeout);
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        };
        let take = |from: std::sync::mpsc::Receiver<Vec<u8>>| {
            from.recv_timeout(TIMEOUT)
                .expect("output ends with the command")
        };
        Finished {
            code: status.code(),
            signal: status.signal(),
            stdout: take(stdout),
            stderr: String::from_utf8_lossy(&take(stderr)).into_owned(),
            peak,
        }
    }
}

/// The kernel's record of a running process's largest resident size in KiB.
fn peak_of(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn collect(mut from: impl Read + Send + 'static) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (to, receiver) = channel();
    thread::spawn(move || {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all);
        let _ = to.send(all);
    });
    receiver
}

/// `thin_check ARGUMENTS FILE`.
pub(crate) fn check(args: &[&str], file: &Path) -> Finished {
    with_file("thin_check", args, file).run()
}

/// `thin_dump ARGUMENTS FILE`.
pub(crate) fn dump(args: &[&str], file: &Path) -> Finished {
    with_file("thin_dump", args, file).run()
}

fn with_file(name: &str, args: &[&str], file: &Path) -> Call {
    let mut call = thintools([name]);
    call.command.args(args).arg(file);
    call
}

/// `thin_restore -i INPUT -o OUTPUT`.
pub(crate) fn restore(input: &Path, output: &Path) -> Finished {
    let mut call = thintools(["thin_restore", "-i"]);
    call.command.arg(input).arg("-o").arg(output);
    call.run()
}

/// A program of Debian's thin-provisioning-tools 0.9, which judges what we write.
pub(crate) fn peer(name: &str, args: &[&OsStr]) -> Finished {
    let path = format!("/usr/sbin/{name}");
    assert!(
        Path::new(&path).exists(),
        "{path} is missing: these tests need Debian's thin-provisioning-tools; tests/run.sh installs them"
    );
    program(&path, args).run()
}

/// The folder of fixtures.
pub(crate) fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/kernel")
}

/// An empty folder that goes away with the value.
pub(crate) fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A compressed file of the fixtures, such as `snap-mix-a/meta.dump-0.9.xml`, expanded.
#[track_caller]
pub(crate) fn expand(name: &str) -> Vec<u8> {
    let path = testdata().join(format!("{name}.zst"));
    let file = fs::File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    zstd::decode_all(file).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The same as text.
#[track_caller]
pub(crate) fn expand_text(name: &str) -> String {
    String::from_utf8(expand(name)).expect("text")
}

/// The files of an archive, by name.
pub(crate) fn untar(tar: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut rest = tar;
    while rest.len() >= 512 && rest[0] != 0 {
        let (header, after) = rest.split_at(512);
        let text = |range: std::ops::Range<usize>| {
            let bytes = &header[range];
            let end = bytes.iter().position(|&b| b == 0 || b == b' ');
            String::from_utf8(bytes[..end.unwrap_or(bytes.len())].to_vec()).expect("text")
        };
        let size = usize::from_str_radix(&text(124..136), 8).expect("a size");
        files.insert(text(0..100), after[..size].to_vec());
        rest = &after[size.next_multiple_of(512)..];
    }
    files
}

/// A JSON file of the fixtures.
#[track_caller]
pub(crate) fn json(name: &str) -> serde_json::Value {
    let text = fs::read(testdata().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    serde_json::from_slice(&text).expect("JSON")
}

/// A metadata image of the fixtures: its folder and its name without `.img.zst`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Fixture {
    /// Such as `held-root`.
    pub(crate) folder: String,
    /// Such as `meta-just-reserved`.
    pub(crate) image: String,
}

impl Fixture {
    /// `folder/image`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.folder, self.image)
    }

    /// The kept dump `folder/image.KIND.xml`, such as `dump-1.3.3`, if there is one.
    pub(crate) fn kept(&self, kind: &str) -> Option<String> {
        let name = format!("{}.{kind}.xml", self.name());
        testdata()
            .join(format!("{name}.zst"))
            .exists()
            .then(|| expand_text(&name))
    }

    /// What fixture.json says of the image.
    pub(crate) fn facts(&self) -> serde_json::Value {
        json(&format!("{}/fixture.json", self.folder))["images"][format!("{}.img", self.image)]
            .clone()
    }
}

/// Every image that the kernel or the tools left undamaged (the folder `damaged` is not among them).
pub(crate) fn fixtures() -> Vec<Fixture> {
    let mut all = Vec::new();
    for entry in fs::read_dir(testdata()).expect("fixtures") {
        let entry = entry.expect("readable");
        let folder = entry.file_name().into_string().expect("plain name");
        if !entry.path().is_dir() || folder == "damaged" {
            continue;
        }
        for file in fs::read_dir(entry.path()).expect("fixture") {
            let file = file
                .expect("readable")
                .file_name()
                .into_string()
                .expect("plain name");
            if let Some(image) = file.strip_suffix(".img.zst") {
                all.push(Fixture {
                    folder: folder.clone(),
                    image: image.to_owned(),
                });
            }
        }
    }
    all.sort();
    assert!(all.len() >= 40, "only {} fixtures found", all.len());
    all
}

/// A metadata image in a temporary file of its own.
#[derive(Debug)]
pub(crate) struct Image {
    folder: TempDir,
    path: PathBuf,
}

impl Image {
    /// A fixture by `folder/image`, such as `snap-mix-a/meta`.
    #[track_caller]
    pub(crate) fn of(name: &str) -> Self {
        Self::from_bytes(&expand(&format!("{name}.img")))
    }

    /// These bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let image = Self::empty(0);
        fs::write(&image.path, bytes).expect("written");
        image
    }

    /// Zeros, for a restore to fill.
    pub(crate) fn empty(blocks: u64) -> Self {
        let folder = folder();
        let path = folder.path().join("meta.img");
        let file = fs::File::create(&path).expect("created");
        file.set_len(blocks * BLOCK_SIZE as u64).expect("sized");
        Self { folder, path }
    }

    /// What `thin_restore` makes of this XML on `blocks` blocks.
    #[track_caller]
    pub(crate) fn restored(xml: &str, blocks: u64) -> Self {
        let image = Self::empty(blocks);
        let input = image.beside("input.xml");
        fs::write(&input, xml).expect("written");
        restore(&input, &image.path).expect(0);
        image
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Another file in the same folder.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Everything in it.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).expect("readable")
    }

    /// Cuts or extends it to `blocks` blocks.
    pub(crate) fn resize(&self, blocks: u64) {
        let file = fs::File::options()
            .write(true)
            .open(&self.path)
            .expect("opened");
        file.set_len(blocks * BLOCK_SIZE as u64).expect("sized");
    }

    /// One block.
    pub(crate) fn block(&self, number: u64) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut block = vec![0; BLOCK_SIZE];
        let file = fs::File::open(&self.path).expect("opened");
        file.read_exact_at(&mut block, number * BLOCK_SIZE as u64)
            .expect("read");
        block
    }

    /// Replaces one block, as it is.
    pub(crate) fn put_block(&self, number: u64, block: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options()
            .write(true)
            .open(&self.path)
            .expect("opened");
        file.write_all_at(block, number * BLOCK_SIZE as u64)
            .expect("written");
    }

    /// Changes one block and leaves its checksum wrong.
    pub(crate) fn spoil_block(&self, number: u64, change: impl FnOnce(&mut [u8])) {
        let mut block = self.block(number);
        change(&mut block);
        self.put_block(number, &block);
    }

    /// Changes one block and seals it again as the kind of block it was.
    #[track_caller]
    pub(crate) fn edit_block(&self, number: u64, change: impl FnOnce(&mut [u8])) {
        self.edit_block_as(number, number, change);
    }

    /// Changes one block and seals it again, claiming to be block `claimed`.
    #[track_caller]
    pub(crate) fn edit_block_as(&self, number: u64, claimed: u64, change: impl FnOnce(&mut [u8])) {
        let mut block = self.block(number);
        let kind = checksum::identify(&block)
            .unwrap_or_else(|| panic!("block {number} has no valid checksum"));
        change(&mut block);
        checksum::seal(&mut block, kind, MetadataBlock(claimed));
        self.put_block(number, &block);
    }

    /// Puts a new node of a btree into a block: its level, its size of values and its entries.
    pub(crate) fn put_node(
        &self,
        number: u64,
        is_leaf: bool,
        entries: &[(u64, Vec<u8>)],
        value_size: usize,
    ) {
        let mut block = vec![0; BLOCK_SIZE];
        let max = 3 * ((BLOCK_SIZE - 32) / (8 + value_size) / 3);
        put_u32(&mut block, 4, if is_leaf { 2 } else { 1 });
        put_u32(&mut block, 16, entries.len() as u32);
        put_u32(&mut block, 20, max as u32);
        put_u32(&mut block, 24, value_size as u32);
        for (i, (key, value)) in entries.iter().enumerate() {
            put_u64(&mut block, 32 + 8 * i, *key);
            let at = 32 + 8 * max + value_size * i;
            block[at..at + value_size].copy_from_slice(value);
        }
        checksum::seal(&mut block, BlockKind::Node, MetadataBlock(number));
        self.put_block(number, &block);
    }

    /// The fields of the superblock.
    pub(crate) fn superblock(&self) -> Fields {
        Fields::unpack(&self.block(0))
    }

    /// Changes fields of the superblock and seals it again.
    pub(crate) fn edit_superblock(&self, change: impl FnOnce(&mut Fields)) {
        let mut fields = self.superblock();
        change(&mut fields);
        self.put_block(0, &fields.pack());
    }

    /// Follows the first child of each node from `root` to a leaf.
    pub(crate) fn first_leaf(&self, root: u64) -> u64 {
        let node = self.block(root);
        if get_u32(&node, 4) & 2 != 0 {
            return root;
        }
        self.first_leaf(get_u64(&node, 32 + 8 * get_u32(&node, 20) as usize))
    }

    /// The root of a device's mapping tree; the top-level tree must be a single leaf.
    pub(crate) fn device_root(&self, device: u64) -> u64 {
        let top = self.block(self.superblock().mapping_root.0);
        assert_eq!(get_u32(&top, 4), 2, "the top-level tree is a single leaf");
        let at = (0..get_u32(&top, 16) as usize)
            .find(|i| get_u64(&top, 32 + 8 * i) == device)
            .expect("the device exists");
        get_u64(&top, 32 + 8 * 252 + 8 * at)
    }

    /// Its dump, read.
    #[track_caller]
    pub(crate) fn dumped(&self) -> Pool {
        Pool::read(&dump(&[], &self.path).expect(0).out())
    }
}

/// A number in a block.
pub(crate) fn get_u32(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(block[at..at + 4].try_into().expect("4 bytes"))
}

/// A number in a block.
pub(crate) fn get_u64(block: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"))
}

/// A number into a block.
pub(crate) fn put_u32(block: &mut [u8], at: usize, value: u32) {
    block[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// A number into a block.
pub(crate) fn put_u64(block: &mut [u8], at: usize, value: u64) {
    block[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Attributes of a tag.
pub(crate) type Attributes = BTreeMap<String, String>;

/// Mappings as (virtual block, data block, length, time).
pub(crate) type Run = (u64, u64, u64, u64);

/// What a dump means: attributes of the superblock, and per device its attributes and its runs with sharing written out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pool {
    /// Without `flags`, which only 0.9 always prints.
    pub(crate) superblock: Attributes,
    /// By device id.
    pub(crate) devices: BTreeMap<u64, (Attributes, Vec<Run>)>,
}

impl Pool {
    /// Reads a dump as the tools write it (one tag after another, no comments).
    #[track_caller]
    pub(crate) fn read(text: &str) -> Self {
        let mut pool = Self::default();
        let mut definitions: BTreeMap<String, Vec<Run>> = BTreeMap::new();
        let mut runs = Vec::new();
        let mut open = Attributes::new();
        for tag in text.split('<').skip(1) {
            let tag = tag.trim_end().strip_suffix('>').expect("a tag ends with >");
            let tag = tag.strip_suffix('/').unwrap_or(tag).trim_end();
            let (name, rest) = tag.split_once(' ').unwrap_or((tag, ""));
            let mut attributes = Attributes::new();
            let mut parts = rest.split('"');
            while let (Some(key), Some(value)) = (parts.next(), parts.next()) {
                let key = key
                    .trim()
                    .strip_suffix('=')
                    .expect("an attribute has a value");
                attributes.insert(key.to_owned(), value.to_owned());
            }
            let number = |key: &str| -> u64 { attributes[key].parse().expect("a number") };
            match name {
                "superblock" => {
                    attributes.remove("flags");
                    pool.superblock = attributes;
                }
                "def" | "device" => open = attributes,
                "single_mapping" => {
                    push(
                        &mut runs,
                        (
                            number("origin_block"),
                            number("data_block"),
                            1,
                            number("time"),
                        ),
                    );
                }
                "range_mapping" => {
                    let (thin, data) = (number("origin_begin"), number("data_begin"));
                    push(&mut runs, (thin, data, number("length"), number("time")));
                }
                "ref" => definitions[&attributes["name"]]
                    .iter()
                    .for_each(|&run| push(&mut runs, run)),
                "/def" => {
                    definitions.insert(open["name"].clone(), std::mem::take(&mut runs));
                }
                "/device" => {
                    let id = open["dev_id"].parse().expect("a number");
                    let device = (std::mem::take(&mut open), std::mem::take(&mut runs));
                    assert!(
                        pool.devices.insert(id, device).is_none(),
                        "device {id} stands twice"
                    );
                }
                "/superblock" => return pool,
                other => panic!("unexpected tag {other}"),
            }
        }
        panic!("the dump is incomplete");
    }

    /// The virtual ranges that each device has mapped, whatever is behind them.
    pub(crate) fn virtual_ranges(&self) -> BTreeMap<u64, Vec<(u64, u64)>> {
        let ranges = |runs: &Vec<Run>| {
            let mut all: Vec<(u64, u64)> = Vec::new();
            for &(begin, _, length, _) in runs {
                match all.last_mut() {
                    Some(last) if last.0 + last.1 == begin => last.1 += length,
                    _ => all.push((begin, length)),
                }
            }
            all
        };
        self.devices
            .iter()
            .map(|(&id, (_, runs))| (id, ranges(runs)))
            .collect()
    }
}

/// Adds a run, joined to the last one where it goes on.
fn push(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && (last.0 + last.2, last.1 + last.2, last.3) == (run.0, run.1, run.3)
    {
        last.2 += run.2;
    } else {
        runs.push(run);
    }
}

/// The damage lines of a check: severity, code and block.
#[track_caller]
pub(crate) fn damage_lines(stderr: &str) -> Vec<(String, String, u64)> {
    let mut found = Vec::new();
    for line in stderr.lines() {
        let Some((severity, rest)) = line.split_once(' ') else {
            continue;
        };
        if !["note", "leak", "repairable", "fatal"].contains(&severity) {
            continue;
        }
        let (code, rest) = rest
            .split_once(": block ")
            .expect("a damage line names a block");
        let (block, _) = rest
            .split_once(':')
            .expect("a damage line says what is wrong");
        found.push((
            severity.to_owned(),
            code.to_owned(),
            block.parse().expect("a number"),
        ));
    }
    found
}

/// Which of the two space maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Map {
    /// That of the data device.
    Data,
    /// That of the metadata device.
    Metadata,
}

/// Blocks that one bitmap counts.
pub(crate) const PER_BITMAP: u64 = 16_320;

/// Edits of space maps, for pools whose data index is a single leaf.
impl Image {
    /// Where the index entry of a bitmap lies: block, offset.
    pub(crate) fn index_entry(&self, map: Map, bitmap: u64) -> (u64, usize) {
        let superblock = self.superblock();
        match map {
            Map::Data => {
                let root = superblock.data_space_map.bitmap_root.0;
                assert_eq!(
                    get_u32(&self.block(root), 4),
                    2,
                    "the data index is a single leaf"
                );
                (root, 32 + 8 * 168 + 16 * bitmap as usize)
            }
            Map::Metadata => (
                superblock.metadata_space_map.bitmap_root.0,
                16 + 16 * bitmap as usize,
            ),
        }
    }

    /// The block of a bitmap.
    pub(crate) fn bitmap(&self, map: Map, bitmap: u64) -> u64 {
        let (block, offset) = self.index_entry(map, bitmap);
        get_u64(&self.block(block), offset)
    }

    /// The 2 bits of a block's count as a number: 3 is "3 or more".
    pub(crate) fn count(&self, map: Map, block: u64) -> u8 {
        let bitmap = self.block(self.bitmap(map, block / PER_BITMAP));
        let entry = (block % PER_BITMAP) as usize;
        let pair = bitmap[16 + entry / 4] >> (2 * (entry % 4)) & 3;
        // The lower bit of a pair holds the higher bit of the count.
        (pair & 1) << 1 | pair >> 1
    }

    /// Sets the 2 bits of a block's count, and nothing that sums them up.
    pub(crate) fn set_count(&self, map: Map, block: u64, count: u8) {
        let entry = (block % PER_BITMAP) as usize;
        let pair = (count & 1) << 1 | count >> 1;
        self.edit_block(self.bitmap(map, block / PER_BITMAP), |bitmap| {
            let byte = &mut bitmap[16 + entry / 4];
            *byte = *byte & !(3 << (2 * (entry % 4))) | pair << (2 * (entry % 4));
        });
    }

    /// Changes a bitmap's number of free entries and its hint in the index.
    pub(crate) fn edit_index(
        &self,
        map: Map,
        bitmap: u64,
        change: impl FnOnce(&mut u32, &mut u32),
    ) {
        let (block, offset) = self.index_entry(map, bitmap);
        self.edit_block(block, |index| {
            let (mut free, mut hint) = (get_u32(index, offset + 8), get_u32(index, offset + 12));
            change(&mut free, &mut hint);
            put_u32(index, offset + 8, free);
            put_u32(index, offset + 12, hint);
        });
    }

    /// Takes an unused block into use once, with all that sums it up, as a program would that then forgets it.
    #[track_caller]
    pub(crate) fn allocate(&self, map: Map, block: u64) {
        assert_eq!(self.count(map, block), 0, "block {block} is in use");
        self.set_count(map, block, 1);
        self.edit_index(map, block / PER_BITMAP, |free, hint| {
            *free -= 1;
            *hint = 0;
        });
        self.edit_superblock(|fields| match map {
            Map::Data => fields.data_space_map.nr_allocated += 1,
            Map::Metadata => fields.metadata_space_map.nr_allocated += 1,
        });
    }

    /// Makes the device's tree, a single leaf, one of two levels: `parts` are the entries of each new leaf and the key that
    /// its parent has for it. Returns the root and the leaves. Space maps follow.
    #[track_caller]
    pub(crate) fn split(
        &self,
        device: u64,
        parts: &[(std::ops::Range<usize>, u64)],
    ) -> (u64, Vec<u64>) {
        let old = self.device_root(device);
        let leaf = self.block(old);
        assert_eq!(get_u32(&leaf, 4), 2, "the tree is a single leaf");
        let all = entries(&leaf, 8);
        let last = self.superblock().metadata_space_map.nr_blocks - 1;
        let mut leaves = Vec::new();
        for (i, (range, _)) in parts.iter().enumerate() {
            let block = if i == 0 { old } else { last - i as u64 };
            if i > 0 {
                self.allocate(Map::Metadata, block);
            }
            self.put_node(block, true, &all[range.clone()], 8);
            leaves.push(block);
        }
        let pointers: Vec<(u64, Vec<u8>)> = parts
            .iter()
            .zip(&leaves)
            .map(|((_, key), block)| (*key, block.to_le_bytes().to_vec()))
            .collect();
        self.allocate(Map::Metadata, last);
        self.put_node(last, false, &pointers, 8);
        self.point_device(device, last);
        (last, leaves)
    }

    /// Gives a device another root.
    pub(crate) fn point_device(&self, device: u64, root: u64) {
        let top = self.superblock().mapping_root.0;
        self.edit_block(top, |node| {
            let count = get_u32(node, 16) as usize;
            let at = (0..count)
                .find(|i| get_u64(node, 32 + 8 * i) == device)
                .expect("the device exists");
            put_u64(node, 32 + 8 * 252 + 8 * at, root);
        });
    }
}

/// The entries of a node with values of this size.
pub(crate) fn entries(node: &[u8], value_size: usize) -> Vec<(u64, Vec<u8>)> {
    let max = get_u32(node, 20) as usize;
    let value = |i: usize| node[32 + 8 * max + value_size * i..][..value_size].to_vec();
    (0..get_u32(node, 16) as usize)
        .map(|i| (get_u64(node, 32 + 8 * i), value(i)))
        .collect()
}
