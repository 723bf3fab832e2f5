//! The NBD server, over an export in memory: by a client that says what no library would, and by the clients that people have.

use rustix::io::Errno;
use std::collections::BTreeMap;
#[cfg(feature = "devtools")]
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output};
use std::sync::Arc;
#[cfg(feature = "devtools")]
use std::sync::{Condvar, Mutex};
use std::time::Duration;
use thintools::runtime::export::{Connection, Export, Exports, Extent, Replier, Request};
use thintools::runtime::memory_export::MemoryExport;
use thintools::runtime::nbd::{Listener, Server};
#[cfg(feature = "devtools")]
use thintools::runtime::{Activation, DeviceRequest, Interceptor, Options, PoolDevice, Runtime};
#[cfg(feature = "devtools")]
use thintools::units::ThinId;

const SIZE: u64 = 16 << 20;
const EINVAL: u32 = 22;

struct Scene {
    folder: tempfile::TempDir,
    disk: Arc<MemoryExport>,
    server: Option<Server>,
}

impl Scene {
    fn new() -> Self {
        let disk = Arc::new(MemoryExport::new(SIZE, false));
        let exports: BTreeMap<String, Arc<MemoryExport>> = BTreeMap::from([
            ("disk".into(), Arc::clone(&disk)),
            ("ro".into(), Arc::new(MemoryExport::new(SIZE, true))),
        ]);
        let mut scene = Self::of(exports);
        scene.disk = disk;
        scene
    }

    fn of(exports: impl Exports + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        let server =
            Server::start(vec![Listener::Unix(listener)], Arc::new(exports), None).unwrap();
        Self {
            folder,
            disk: Arc::new(MemoryExport::new(0, true)),
            server: Some(server),
        }
    }

    fn uri(&self, export: &str) -> String {
        let socket = self.folder.path().join("s");
        format!("nbd+unix:///{export}?socket={}", socket.display())
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.folder.path().join("s")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut client = Client { stream };
        assert_eq!(client.bytes(18), b"NBDMAGICIHAVEOPT\x00\x03");
        client.send(&[&[0, 0, 0, 3]]);
        client
    }

    /// A client in transmission.
    fn open(&self, export: &str, style: u32, contexts: &[&str]) -> Client {
        let mut client = self.client();
        if style != 0 {
            assert_eq!(client.ask(style, &[]), [(1, vec![])]);
        }
        if !contexts.is_empty() {
            let replies = client.ask(10, &meta(export, contexts));
            assert_eq!(replies.len(), contexts.len() + 1);
        }
        let replies = client.ask(7, &go(export));
        assert_eq!(replies.last(), Some(&(1, vec![])));
        client
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        let output = Command::new(program).args(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {error}");
        output
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.server.take().unwrap().stop();
    }
}

const STRUCTURED: u32 = 8;
const EXTENDED: u32 = 11;
const FAILED: u32 = 1 << 31;

struct Client {
    stream: UnixStream,
}

impl Client {
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn number(&mut self, len: usize) -> u64 {
        self.bytes(len)
            .iter()
            .fold(0, |n, &b| n << 8 | u64::from(b))
    }

    fn send(&mut self, parts: &[&[u8]]) {
        self.stream.write_all(&parts.concat()).unwrap();
    }

    /// An option with its replies.
    fn ask(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.say(option, data);
        self.replies(option)
    }

    fn say(&mut self, option: u32, data: &[u8]) {
        let len = (data.len() as u32).to_be_bytes();
        self.send(&[b"IHAVEOPT", &option.to_be_bytes(), &len, data]);
    }

    fn replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.number(8), 0x0003_e889_0455_65a9);
            assert_eq!(self.number(4), u64::from(option));
            let (kind, len) = (self.number(4) as u32, self.number(4) as usize);
            replies.push((kind, self.bytes(len)));
            if kind == 1 || kind >= FAILED {
                return replies;
            }
        }
    }

    fn refused(&mut self, option: u32, data: &[u8], error: u32) {
        let replies = self.ask(option, data);
        assert_eq!(replies[0].0, FAILED | error, "option {option}: {replies:?}");
    }

    fn request(&mut self, command: u16, flags: u16, range: (u64, u32), data: &[u8]) {
        self.send(&[&request(command, flags, range), data]);
    }

    fn simple_reply(&mut self) -> u32 {
        assert_eq!(self.number(4), 0x6744_6698);
        let error = self.number(4) as u32;
        assert_eq!(self.number(8), 77);
        error
    }

    fn simple(&mut self, command: u16, flags: u16, range: (u64, u32), data: &[u8]) -> u32 {
        self.request(command, flags, range, data);
        self.simple_reply()
    }

    /// A chunk: its flags, its kind, its payload.
    fn chunk(&mut self) -> (u64, u64, Vec<u8>) {
        assert_eq!(self.number(4), 0x668e_33ef);
        let (flags, kind) = (self.number(2), self.number(2));
        assert_eq!(self.number(8), 77);
        let len = self.number(4) as usize;
        (flags, kind, self.bytes(len))
    }

    /// A structured read: what was found, and in how many chunks.
    fn read_chunks(&mut self, range: Range<usize>) -> (Vec<u8>, usize) {
        let (mut found, mut chunks) = (vec![7; range.len()], 0);
        self.request(0, 0, (range.start as u64, range.len() as u32), &[]);
        loop {
            let (flags, kind, payload) = self.chunk();
            let (at, rest) = payload.split_at(8);
            let at = u64::from_be_bytes(at.try_into().unwrap()) as usize - range.start;
            match kind {
                1 => found[at..at + rest.len()].copy_from_slice(rest),
                2 => {
                    let len = u32::from_be_bytes(rest.try_into().unwrap()) as usize;
                    found[at..at + len].fill(0);
                }
                other => panic!("a chunk of kind {other}"),
            }
            chunks += 1;
            if flags == 1 {
                return (found, chunks);
            }
        }
    }

    fn is_hung_up_on(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0) | Err(_))
    }
}

/// The head of a request.
fn request(command: u16, flags: u16, (offset, len): (u64, u32)) -> Vec<u8> {
    let mut head = 0x2560_9513_u32.to_be_bytes().to_vec();
    head.extend(flags.to_be_bytes());
    head.extend(command.to_be_bytes());
    head.extend(77_u64.to_be_bytes());
    head.extend(offset.to_be_bytes());
    head.extend(len.to_be_bytes());
    head
}

fn named(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat()
}

fn go(name: &str) -> Vec<u8> {
    [named(name), vec![0, 0]].concat()
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = named(name);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(named(query)));
    data
}

#[test]
fn every_option_has_its_answer() {
    let scene = Scene::new();
    let mut client = scene.client();
    let list = client.ask(3, &[]);
    assert_eq!(list.len(), 3);
    assert!(list[0].1.starts_with(&named("disk")) && list[1].1.starts_with(&named("ro")));
    client.refused(3, b"x", 3);
    client.refused(5, &[], 2);
    client.refused(4, &[], 1);
    client.refused(12345, b"whatever", 1);
    client.refused(6, &go("nobody"), 6);
    client.refused(6, b"\xff\xff\xff\xff", 3);
    client.refused(7, &go("disk")[..5], 3);
    client.refused(9, &meta("disk", &[]), 3);
    client.refused(3, &vec![0; 100_000], 9);
    let info = client.ask(6, &[named("ro"), vec![0, 2, 0, 1, 0, 2]].concat());
    assert_eq!(info.len(), 5);
    assert_eq!(info[0].1[..10], [&[0, 0], &SIZE.to_be_bytes()[..]].concat());
    assert_eq!(info[0].1[11] & 2, 2, "it is read-only");
    assert_eq!(info[2].1, b"\0\x01ro");
    assert_eq!(client.ask(STRUCTURED, &[]), [(1, vec![])]);
    let all = client.ask(9, &meta("disk", &[]));
    assert_eq!(all.len(), 4);
    assert_eq!(client.ask(9, &meta("disk", &["qemu:"])).len(), 3);
    assert_eq!(client.ask(9, &meta("disk", &["dm-thin:"])).len(), 1);
    client.refused(9, &meta("nobody", &[]), 6);
    let set = client.ask(10, &meta("disk", &["base:allocation", "other:thing"]));
    assert_eq!(set[0].1, b"\0\0\0\x01base:allocation");
    assert_eq!(set.len(), 2);
    assert_eq!(client.ask(EXTENDED, &[]), [(1, vec![])]);
    client.refused(STRUCTURED, &[], 10);
    assert_eq!(client.ask(2, &[]), [(1, vec![])]);
    assert!(client.is_hung_up_on());
}

#[test]
fn the_old_way_of_opening_works() {
    let scene = Scene::new();
    let mut client = scene.client();
    client.send(&[b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 0]]);
    assert_eq!(client.number(8), SIZE);
    assert_eq!(client.number(2) & 3, 1);
    assert_eq!(client.simple(3, 0, (0, 0), &[]), 0);
    let mut client = scene.client();
    client.send(&[b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 1], b"?"]);
    assert!(client.is_hung_up_on());
}

#[test]
fn what_cannot_be_done_is_refused_with_the_usual_errors() {
    let scene = Scene::new();
    let mut client = scene.open("disk", 0, &[]);
    let (read, write, flush, trim, cache, zero) = (0, 1, 3, 4, 5, 6);
    assert_eq!(client.simple(read, 0, (SIZE, 1), &[]), EINVAL);
    assert_eq!(client.simple(read, 0, (u64::MAX, 9), &[]), EINVAL);
    assert_eq!(client.simple(read, 0, (0, 0), &[]), EINVAL);
    assert_eq!(
        client.simple(read, 4, (0, 1), &[]),
        EINVAL,
        "DF in simple replies"
    );
    assert_eq!(client.simple(read, 0, (0, u32::MAX), &[]), EINVAL);
    assert_eq!(client.simple(write, 0, (SIZE - 1, 2), b"ab"), 28);
    assert_eq!(client.simple(write, 0, (0, 0), &[]), EINVAL);
    let long = vec![1; (32 << 20) + 1];
    assert_eq!(
        client.simple(write, 0, (0, long.len() as u32), &long),
        EINVAL
    );
    assert_eq!(client.simple(trim, 0, (SIZE, 1), &[]), EINVAL);
    assert_eq!(client.simple(zero, 0, (SIZE, 1), &[]), 28);
    assert_eq!(client.simple(zero, 16 | 2, (0, 65536), &[]), 95);
    assert_eq!(client.simple(flush, 0, (1, 1), &[]), EINVAL);
    assert_eq!(
        client.simple(7, 0, (0, 1), &[]),
        EINVAL,
        "no context was chosen"
    );
    assert_eq!(client.simple(99, 0, (0, 1), &[]), EINVAL);
    assert_eq!(client.simple(cache, 0, (0, 4096), &[]), 0);
    let mut client = scene.open("ro", 0, &[]);
    assert_eq!(client.simple(write, 0, (0, 3), b"abc"), 1);
    assert_eq!(client.simple(trim, 0, (0, 3), &[]), 1);
    assert_eq!(client.simple(zero, 0, (0, 3), &[]), 1);
    assert_eq!(client.simple(read, 0, (0, 3), &[]), 0);
    assert_eq!(client.bytes(3), [0; 3]);
    client.request(write, 0, (0, u32::MAX), &[]);
    assert!(client.is_hung_up_on(), "nobody reads 4 GiB to refuse them");
}

#[test]
fn what_is_to_be_durable_is_so_before_the_answer() {
    let scene = Scene::new();
    let mut client = scene.open("disk", 0, &[]);
    for (command, flags, flushes) in [(1, 0, 0), (1, 1, 1), (3, 0, 2), (4, 1, 3), (6, 1, 4)] {
        let len = if command == 3 { 0 } else { 4 };
        let data: &[u8] = if command == 1 { b"data" } else { &[] };
        assert_eq!(client.simple(command, flags, (0, len), data), 0);
        assert_eq!(scene.disk.flushes(), flushes);
    }
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let scene = Scene::new();
    let mut client = scene.open("disk", 0, &[]);
    let mut sender = Client {
        stream: client.stream.try_clone().unwrap(),
    };
    let sends = std::thread::spawn(move || {
        for at in 0..1000_u64 {
            sender.request(1, 0, (at * 5000, 5000), &[at as u8; 5000]);
            sender.request(0, 0, (0, 1 << 20), &[]);
        }
    });
    for _ in 0..1000 {
        assert_eq!(client.simple_reply(), 0);
        assert_eq!(client.simple_reply(), 0);
        client.bytes(1 << 20);
    }
    sends.join().unwrap();
}

#[test]
fn structured_replies_tell_data_errors_and_extents() {
    let scene = Scene::new();
    let contexts = ["base:allocation", "qemu:dirty-bitmap:all"];
    let mut client = scene.open("disk", STRUCTURED, &contexts);
    client.request(1, 0, (65536, 4), b"data");
    assert_eq!(client.chunk(), (1, 0, vec![]));
    client.request(0, 4, (65536, 4), &[]);
    let payload = [&65536_u64.to_be_bytes()[..], b"data"].concat();
    assert_eq!(client.chunk(), (1, 1, payload));
    client.request(0, 0, (SIZE, 4), &[]);
    assert_eq!(client.chunk(), (1, 32769, vec![0, 0, 0, 22, 0, 0]));
    let told = |id: u32, extents: &[(u32, u32)]| {
        let mut data = id.to_be_bytes().to_vec();
        for (len, status) in extents {
            data.extend(len.to_be_bytes());
            data.extend(status.to_be_bytes());
        }
        data
    };
    client.request(7, 0, (0, 4 * 65536), &[]);
    let holes = [(65536, 3), (65536, 0), (131_072, 3)];
    assert_eq!(client.chunk(), (0, 5, told(1, &holes)));
    let dirty = [(65536, 0), (65536, 1), (131_072, 0)];
    assert_eq!(client.chunk(), (1, 5, told(2, &dirty)));
    client.request(7, 8, (1, 4 * 65536), &[]);
    assert_eq!(client.chunk(), (0, 5, told(1, &[(65535, 3)])));
    client.chunk();
}

#[test]
fn zeros_of_a_hole_are_told_and_not_sent() {
    let scene = Scene::new();
    let mut client = scene.open("disk", STRUCTURED, &[]);
    client.request(1, 0, (100_000, 40_000), &[9; 40_000]);
    client.chunk();
    client.request(0, 0, (1000, 1 << 20), &[]);
    let hole = |at: u64, len: u32| [&at.to_be_bytes()[..], &len.to_be_bytes()].concat();
    assert_eq!(client.chunk(), (0, 2, hole(1000, 64536)));
    let (flags, kind, payload) = client.chunk();
    assert_eq!((flags, kind, payload.len()), (0, 1, 8 + 131_072));
    assert!(payload[8 + 34464..][..40_000] == [9; 40_000]);
    assert_eq!(client.chunk(), (1, 2, hole(196_608, 852_968)));
    client.request(0, 0, (1 << 20, 1 << 20), &[]);
    assert_eq!(client.chunk(), (1, 2, hole(1 << 20, 1 << 20)));
    client.request(0, 4, (1 << 20, 1 << 20), &[]);
    let (flags, kind, payload) = client.chunk();
    assert_eq!((flags, kind), (1, 1), "DF is kept");
    assert!(payload[8..] == vec![0; 1 << 20]);
}

/// Keeps flushes of the metadata from ending as long as it is closed.
#[cfg(feature = "devtools")]
#[derive(Debug, Default)]
struct Gate {
    /// Whether it is closed, and how many wait.
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

#[cfg(feature = "devtools")]
impl Gate {
    fn set(&self, is_closed: bool) {
        self.state.lock().unwrap().0 = is_closed;
        self.changed.notify_all();
    }

    fn wait_for_one(&self) {
        let state = self.state.lock().unwrap();
        let (state, _) = (self.changed)
            .wait_timeout_while(state, Duration::from_secs(60), |state| state.1 == 0)
            .unwrap();
        assert!(state.1 > 0, "nothing is flushed");
    }
}

#[cfg(feature = "devtools")]
impl Interceptor for Gate {
    fn begin(&self, device: PoolDevice, request: &DeviceRequest<'_>) -> std::io::Result<u64> {
        if matches!(
            (device, request),
            (PoolDevice::Metadata, DeviceRequest::Flush)
        ) {
            let mut state = self.state.lock().unwrap();
            state.1 += 1;
            self.changed.notify_all();
            let waited = self.changed.wait_while(state, |state| state.0);
            waited.unwrap().1 -= 1;
        }
        Ok(0)
    }

    fn end(&self, _: u64) {}
}

/// Opens a gate, also after a failure.
#[cfg(feature = "devtools")]
struct Opens(Arc<Gate>);

#[cfg(feature = "devtools")]
impl Drop for Opens {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

#[cfg(feature = "devtools")]
#[test]
fn who_reads_asks_or_connects_does_not_wait_for_the_disk_of_a_commit() {
    const BLOCK: usize = 65536;
    let folder = tempfile::tempdir().unwrap();
    let (metadata, data) = (folder.path().join("meta"), folder.path().join("data"));
    for (path, len) in [(&metadata, 1 << 20), (&data, 64 * BLOCK as u64)] {
        File::create(path).unwrap().set_len(len).unwrap();
    }
    let gate = Arc::new(Gate::default());
    let options = Options {
        create: Some(128),
        interceptor: Some(Arc::clone(&gate) as _),
        ..Options::new(&metadata, &data)
    };
    let runtime = Runtime::open(&options).unwrap();
    for id in 0..3 {
        let size = Some(1 << 20);
        let activation = Activation { size, origin: None };
        let create = format!("create_thin {id}").parse().unwrap();
        runtime.message(create).unwrap();
        runtime.activate(ThinId(id), activation).unwrap();
    }
    let scene = Scene::of(runtime);
    let allocation = ["base:allocation"];
    let mut reader = scene.open("0", STRUCTURED, &allocation);
    let mut other = scene.open("1", STRUCTURED, &allocation);
    let mut writer = scene.open("0", 0, &[]);
    let data = vec![1; 2 * BLOCK];
    let range = (BLOCK as u64, 2 * BLOCK as u32);
    assert_eq!(writer.simple(1, 0, range, &data), 0);
    let opens = Opens(Arc::clone(&gate));
    gate.set(true);
    writer.request(3, 0, (0, 0), &[]);
    gate.wait_for_one();
    let expected = [&vec![0; BLOCK][..], &data, &vec![0; BLOCK]].concat();
    let (found, chunks) = reader.read_chunks(0..4 * BLOCK);
    assert!(found == expected, "what is mapped was not read");
    assert_eq!(chunks, 3, "a hole, data, a hole");
    let told = |extents: &[(u32, u32)]| {
        let mut payload = 1_u32.to_be_bytes().to_vec();
        for number in extents.iter().flat_map(|(len, status)| [len, status]) {
            payload.extend(number.to_be_bytes());
        }
        (1, 5, payload)
    };
    let block = BLOCK as u32;
    reader.request(7, 0, (0, 4 * block), &[]);
    let extents = [(block, 3), (2 * block, 0), (block, 3)];
    assert_eq!(reader.chunk(), told(&extents));
    other.request(7, 0, (0, 1 << 20), &[]);
    assert_eq!(other.chunk(), told(&[(1 << 20, 3)]));
    // Whoever opens a device first waits, and keeps nobody from the others.
    let mut first = scene.client();
    first.say(7, &go("2"));
    std::thread::sleep(Duration::from_millis(200));
    let mut late = scene.open("0", STRUCTURED, &allocation);
    assert!(late.read_chunks(0..4 * BLOCK).0 == expected);
    drop(opens);
    assert_eq!(writer.simple_reply(), 0);
    assert_eq!(first.replies(7).last(), Some(&(1, vec![])));
}

#[test]
fn extended_headers_take_long_requests() {
    let scene = Scene::new();
    let mut client = scene.open("disk", EXTENDED, &["base:allocation"]);
    let mut ask = |command: u16, flags: u16, len: u64, data: &[u8]| {
        let mut head = 0x21e4_1c71_u32.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend(5_u64.to_be_bytes());
        head.extend(0_u64.to_be_bytes());
        head.extend(len.to_be_bytes());
        client.send(&[&head, data]);
        assert_eq!(client.number(4), 0x6e8a_278c);
        assert_eq!(client.number(2), 1);
        let kind = client.number(2);
        assert_eq!((client.number(8), client.number(8)), (5, 0));
        let len = client.number(8) as usize;
        (kind, client.bytes(len))
    };
    assert_eq!(ask(1, 32, 4, b"data"), (0, vec![]));
    assert_eq!(ask(0, 0, 4, &[]).1, b"\0\0\0\0\0\0\0\0data");
    assert_eq!(ask(4, 32, 4, b"what"), (32769, vec![0, 0, 0, 22, 0, 0]));
    assert_eq!(ask(6, 0, 1 << 40, &[]), (32769, vec![0, 0, 0, 28, 0, 0]));
    let (kind, extents) = ask(7, 0, SIZE, &[]);
    assert_eq!((kind, extents.len()), (6, 8 + 2 * 16));
    assert_eq!(extents[..8], [0, 0, 0, 1, 0, 0, 0, 2]);
    assert_eq!(ask(4, 0, SIZE, &[]), (0, vec![]));
}

#[test]
fn whoever_talks_nonsense_or_takes_nothing_holds_up_nobody() {
    let scene = Scene::new();
    let mut nonsense = scene.client();
    nonsense.send(&[&[7; 64]]);
    assert!(nonsense.is_hung_up_on());
    let mut nonsense = scene.open("disk", 0, &[]);
    nonsense.send(&[&[7; 28]]);
    assert!(nonsense.is_hung_up_on());
    let mut lazy = scene.open("disk", 0, &[]);
    for _ in 0..100 {
        lazy.request(0, 0, (0, 1 << 20), &[]);
    }
    let _silent = scene.client();
    let mut other = scene.open("disk", 0, &[]);
    assert_eq!(other.simple(3, 0, (0, 0), &[]), 0);
    lazy.stream.shutdown(Shutdown::Both).unwrap();
}

/// Has clients that take nothing borrow all memory that there is.
fn exhaust(scene: &Scene) -> Vec<Client> {
    let lazy: Vec<Client> = (0..12).map(|_| scene.open("disk", 0, &[])).collect();
    for client in &lazy {
        let head = request(0, 0, (0, SIZE as u32));
        (&client.stream).write_all(&head).unwrap();
        // Some of it has come: it was read.
        (&client.stream).read_exact(&mut [0; 16]).unwrap();
    }
    lazy
}

#[test]
fn without_memory_to_borrow_requests_are_carried_out_in_pieces() {
    let scene = Scene::new();
    let data: Vec<u8> = (0..SIZE).map(|i| (i / 7 % 251) as u8).collect();
    let mut client = scene.open("disk", STRUCTURED, &[]);
    client.request(1, 0, (0, SIZE as u32), &data);
    assert_eq!(client.chunk(), (1, 0, vec![]));
    client.request(0, 0, (0, SIZE as u32), &[]);
    assert_eq!(client.chunk().0, 1, "one chunk as long as there is memory");
    let lazy = exhaust(&scene);
    let (found, chunks) = client.read_chunks(1..SIZE as usize);
    assert!(found == data[1..] && chunks >= 32, "{chunks} chunks");
    client.request(0, 4, (0, SIZE as u32), &[]);
    let (flags, kind, payload) = client.chunk();
    assert_eq!((flags, kind), (1, 1), "DF is kept");
    assert!(payload[8..] == data);
    let reversed: Vec<u8> = data.iter().rev().copied().collect();
    client.request(1, 1, (0, SIZE as u32), &reversed);
    assert_eq!(client.chunk(), (1, 0, vec![]));
    let mut simple = scene.open("disk", 0, &[]);
    assert_eq!(simple.simple(0, 0, (0, SIZE as u32), &[]), 0);
    assert!(simple.bytes(SIZE as usize) == reversed);
    // Whoever takes what it asked for gives room to others.
    for mut client in lazy {
        // Some of it may have been read after the write.
        client.bytes(SIZE as usize);
    }
    let is_whole = |_| client.read_chunks(0..SIZE as usize).1 == 1;
    assert!(
        (0..1000).any(is_whole),
        "what was borrowed is not given back"
    );
}

/// A disk of which everything from 1 MiB on is lost.
struct Broken(Arc<MemoryExport>);

impl Exports for Broken {
    fn find(&self, _: &str) -> Option<Arc<dyn Export>> {
        Some(Arc::new(Self(Arc::clone(&self.0))))
    }

    fn list(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

impl Export for Broken {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn preferred_block(&self) -> u32 {
        4096
    }

    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }

    fn extents(&self, _: &str, _: Range<u64>, _: usize) -> Result<Vec<Extent>, Errno> {
        Err(Errno::IO)
    }

    fn allocated(&self) -> Result<u64, Errno> {
        Ok(SIZE)
    }

    fn connect(self: Arc<Self>) -> Box<dyn Connection> {
        Box::new(Broken(Arc::clone(&self.0)))
    }
}

impl Connection for Broken {
    fn submit(&mut self, request: Request, reply: Replier) {
        match request {
            Request::Read { offset, len } if offset + len as u64 > 1 << 20 => {
                reply.answer(Err(Errno::IO));
            }
            other => Arc::clone(&self.0).connect().submit(other, reply),
        }
    }
}

#[test]
fn an_error_in_a_piece_is_told_where_it_is() {
    let scene = Scene::of(Broken(Arc::new(MemoryExport::new(SIZE, true))));
    let mut client = scene.open("disk", STRUCTURED, &[]);
    client.request(0, 0, (0, 2 << 20), &[]);
    assert_eq!(client.chunk(), (1, 32769, vec![0, 0, 0, 5, 0, 0]));
    // What is not lost can be had, but 12 times half a megabyte is not all memory.
    let mut lazy: Vec<Client> = (0..256 - 2).map(|_| scene.open("disk", 0, &[])).collect();
    for client in &mut lazy {
        client.request(0, 0, (0, 1 << 20), &[]);
        assert_eq!(client.simple_reply(), 0);
    }
    client.request(0, 0, (0, 2 << 20), &[]);
    let (mut data, mut errors) = (0, Vec::new());
    loop {
        let (flags, kind, payload) = client.chunk();
        match kind {
            1 => data += payload.len() - 8,
            _ => errors.push((kind, payload)),
        }
        if flags == 1 {
            break;
        }
    }
    assert!(
        (768 << 10..=1 << 20).contains(&data),
        "{data} bytes of data"
    );
    let first = (data as u64).to_be_bytes();
    assert_eq!(
        errors[0],
        (32770, [&[0, 0, 0, 5, 0, 0], &first[..]].concat())
    );
    // There is no way to tell it in the middle of a simple reply.
    let mut simple = scene.open("disk", 0, &[]);
    simple.request(0, 0, (0, 2 << 20), &[]);
    assert_eq!(simple.simple_reply(), 0);
    let mut taken = Vec::new();
    let _ = simple.stream.read_to_end(&mut taken);
    assert_eq!(taken.len(), data);
}

#[test]
fn replies_are_not_held_back_until_the_data_of_the_next_write_have_come() {
    let scene = Scene::new();
    let mut client = scene.open("disk", 0, &[]);
    // One that is carried out, one that is too long for what is gathered, one that is refused, and parts of their data.
    for (at, len, error) in [(0, 4096, 0), (4096, 1 << 20, 0), (SIZE, 4096, 28)] {
        for sent in [0, 1000] {
            let data = vec![9; len as usize];
            let (first, rest) = data.split_at(sent);
            let requests = [request(0, 0, (0, 512)), request(1, 0, (at, len))].concat();
            client.send(&[&requests, first]);
            assert_eq!(client.simple_reply(), 0);
            client.bytes(512);
            client.send(&[rest]);
            assert_eq!(client.simple_reply(), error);
        }
    }
}

#[test]
fn refusals_leave_the_requests_that_follow_in_step() {
    let scene = Scene::new();
    let mut client = scene.open("disk", 0, &[]);
    client.request(1, 0, (SIZE, 5000), &[1; 5000]);
    client.request(1, 1 << 15, (0, 5000), &[2; 5000]);
    client.request(99, 0, (0, 5000), &[]);
    client.request(0, 0, (SIZE, 5000), &[]);
    client.request(1, 0, (0, 4), b"data");
    client.request(0, 0, (0, 4), &[]);
    for error in [28, EINVAL, EINVAL, EINVAL, 0, 0] {
        assert_eq!(client.simple_reply(), error);
    }
    assert_eq!(client.bytes(4), b"data");
}

#[test]
fn whoever_leaves_in_the_middle_of_a_word_holds_up_nobody() {
    let scene = Scene::new();
    let mut other = scene.open("disk", 0, &[]);
    let name = go("disk");
    let option = [&b"IHAVEOPT\0\0\0\x07\0\0\0"[..], &[name.len() as u8], &name].concat();
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0, 0, 0, 1]);
    request.extend([0; 16]);
    request.extend([0, 0, 0, 8]);
    let said = [&option, &request, &[7; 8][..]].concat();
    for len in 0..said.len() {
        scene.client().send(&[&said[..len]]);
        assert_eq!(other.simple(0, 0, (0, 8), &[]), 0);
        assert_eq!(other.bytes(8), [0; 8], "half a write was carried out");
    }
}

#[test]
fn tcp_is_for_this_machine_alone() {
    let exports = || Arc::new(BTreeMap::<String, Arc<MemoryExport>>::new());
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let refusal = Server::start(vec![Listener::Tcp(listener)], exports(), None);
    let refusal = refusal.err().expect("refused").to_string();
    assert!(refusal.contains("Unix socket"), "{refusal}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    Server::start(vec![Listener::Tcp(listener)], exports(), None)
        .unwrap()
        .stop();
}

#[test]
fn clients_that_people_have_work() {
    let scene = Scene::new();
    let uri = scene.uri("disk");
    let path = |name: &str| scene.folder.path().join(name).display().to_string();
    let data: Vec<u8> = (0..SIZE)
        .map(|i| (i / 7 % 251) as u8 * u8::from(i < 5 << 20))
        .collect();
    std::fs::write(path("in"), &data).unwrap();
    scene.run("nbdcopy", &["--flush", &path("in"), &uri]);
    scene.run("nbdcopy", &[&uri, &path("out")]);
    assert!(std::fs::read(path("out")).unwrap() == data);
    let list = scene.run("nbdinfo", &["--list", &scene.uri("")]).stdout;
    let list = String::from_utf8(list).unwrap();
    assert!(list.contains("disk") && list.contains("ro"), "{list}");
    let map = scene.run("nbdinfo", &["--map", "--totals", &uri]).stdout;
    let map = String::from_utf8(map).unwrap();
    assert!(
        map.contains("hole,zero") && map.contains("5242880"),
        "{map}"
    );
    scene.run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &uri, &path("out2")],
    );
    assert!(std::fs::read(path("out2")).unwrap() == data);
    scene.run("qemu-img", &["info", "-f", "raw", &uri]);
    scene.run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
    let bench = [
        "bench", "-f", "raw", "-w", "-c", "2000", "-d", "32", "-s", "4096", &uri,
    ];
    scene.run("qemu-img", &bench);
    let io = [
        "write -P 0xaa 1M 1M",
        "write -z -u 8M 1M",
        "write -f -P 3 4M 64k",
        "discard 1M 64k",
        "flush",
        "read -P 0xaa 1088k 960k",
        "read -P 0 1M 64k",
    ];
    let io = io.iter().flat_map(|command| ["-c", command]);
    let args: Vec<&str> = ["-f", "raw"].into_iter().chain(io).chain([&*uri]).collect();
    let told = scene.run("qemu-io", &args).stdout;
    let told = String::from_utf8(told).unwrap();
    assert!(!told.contains("failed"), "{told}");
    let given = format!("--uri={uri}");
    let fio = [
        "--name=verify",
        "--ioengine=nbd",
        &given,
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=32",
        "--size=8M",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_state_save=0",
    ];
    scene.run("fio", &fio);
}
