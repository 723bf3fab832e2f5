//! The power goes while several clients use a pool with snapshots: both devices have lost any of the writes that were not flushed, or
//! parts of them. The pool opens all the same, its metadata is sound, and all that was acknowledged as durable is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};
use std::{env, io};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::runtime::export::{Exports, Replier, Request};
use thintools::runtime::nbd::{Listener, Server};
use thintools::runtime::{Activation, DeviceRequest, Interceptor, Options, PoolDevice, Runtime};
use thintools::units::ThinId;

use crate::crash::codes_of;
use crate::serve::BLOCK;
use crate::serve::load::{Load, SECTOR, assert_snapshots};
use crate::support::folder;

/// Blocks of the pool: too few for all devices, now and then.
const DATA_BLOCKS: usize = 36;
const METADATA: usize = 512 << 10;
/// Blocks of a thin device.
const THIN_BLOCKS: usize = 10;

/// Something that happened to a device.
enum Entry {
    /// These bytes began to be written.
    Write {
        device: PoolDevice,
        byte: usize,
        data: Vec<u8>,
        is_durable: bool,
    },
    /// A flush began.
    Flush { device: PoolDevice },
    /// What was entered at this place is over.
    End(usize),
    /// Nothing that matters here.
    Mark,
}

/// Records what goes to both devices. The number of entries is the time.
#[derive(Default)]
struct Recorder(Mutex<Vec<Entry>>);

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recorder")
    }
}

impl Recorder {
    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().expect("no panic")
    }

    /// The time, at which nothing else happens.
    fn now(&self) -> u64 {
        let mut entries = self.entries();
        entries.push(Entry::Mark);
        entries.len() as u64
    }
}

impl Interceptor for Recorder {
    fn begin(&self, device: PoolDevice, request: &DeviceRequest<'_>) -> io::Result<u64> {
        let write = |byte, data, is_durable| Entry::Write {
            device,
            byte: byte as usize,
            data,
            is_durable,
        };
        let entry = match *request {
            DeviceRequest::Read { .. } => return Ok(u64::MAX),
            DeviceRequest::Write {
                byte,
                data,
                is_durable,
            } => write(byte, data.to_vec(), is_durable),
            DeviceRequest::Zero { byte, len } | DeviceRequest::Discard { byte, len } => {
                write(byte, vec![0; len as usize], false)
            }
            DeviceRequest::Flush => Entry::Flush { device },
        };
        let mut entries = self.entries();
        entries.push(entry);
        Ok(entries.len() as u64 - 1)
    }

    fn end(&self, number: u64) {
        if number != u64::MAX {
            self.entries().push(Entry::End(number as usize));
        }
    }
}

/// A write that is not durable yet.
struct Pending {
    /// Its place in the record.
    place: usize,
    first_sector: usize,
    /// Whole sectors, as they were in memory then.
    content: Vec<u8>,
    /// The place of its end.
    ended: Option<usize>,
}

/// A device whose record is played.
struct Medium {
    /// What is durable.
    durable: Vec<u8>,
    /// By sector: the place of the write that made it so.
    newest: Vec<usize>,
    /// What a reader finds while there is power.
    current: Vec<u8>,
    pending: Vec<Pending>,
}

impl Medium {
    fn new(len: usize) -> Self {
        Self {
            durable: vec![0; len],
            newest: vec![0; len / SECTOR],
            current: vec![0; len],
            pending: Vec::new(),
        }
    }

    fn write(&mut self, place: usize, byte: usize, data: &[u8]) {
        self.current[byte..byte + data.len()].copy_from_slice(data);
        let (first, end) = (byte / SECTOR, (byte + data.len()).div_ceil(SECTOR));
        self.pending.push(Pending {
            place,
            first_sector: first,
            content: self.current[first * SECTOR..end * SECTOR].to_vec(),
            ended: None,
        });
    }

    /// What was written before and is chosen is durable now.
    fn settle(&mut self, is_chosen: impl Fn(&Pending) -> bool) {
        for write in self.pending.extract_if(.., |write| is_chosen(write)) {
            let sectors = (write.first_sector..).zip(write.content.chunks(SECTOR));
            for (sector, content) in sectors {
                if self.newest[sector] <= write.place {
                    self.newest[sector] = write.place;
                    self.durable[sector * SECTOR..][..SECTOR].copy_from_slice(content);
                }
            }
        }
    }

    /// What may be left when the power goes: of what is not durable each write is lost at random, or a part of it.
    fn cut(&self, rng: &mut SmallRng) -> Vec<u8> {
        let mut left = self.durable.clone();
        let percent_lost = [0, 30, 60, 95, 100][rng.random_range(0..5)];
        for write in &self.pending {
            let is_lost = rng.random_range(0..100) < percent_lost;
            let is_torn = rng.random_ratio(1, 3);
            let sectors = (write.first_sector..).zip(write.content.chunks(SECTOR));
            for (sector, content) in sectors {
                let lands = if is_torn { rng.random() } else { !is_lost };
                if lands && self.newest[sector] <= write.place {
                    left[sector * SECTOR..][..SECTOR].copy_from_slice(content);
                }
            }
        }
        left
    }
}

/// Both devices, as far as their record was played.
struct Playback<'a> {
    entries: &'a [Entry],
    at: usize,
    metadata: Medium,
    data: Medium,
}

impl Playback<'_> {
    fn medium(&mut self, device: PoolDevice) -> &mut Medium {
        match device {
            PoolDevice::Metadata => &mut self.metadata,
            PoolDevice::Data => &mut self.data,
        }
    }

    fn advance(&mut self, to: usize) {
        for place in self.at..to {
            match &self.entries[place] {
                Entry::Write {
                    device, byte, data, ..
                } => self.medium(*device).write(place, *byte, data),
                Entry::End(begun) => match self.entries[*begun] {
                    Entry::Write {
                        device, is_durable, ..
                    } => {
                        let medium = self.medium(device);
                        let written = medium
                            .pending
                            .iter_mut()
                            .find(|write| write.place == *begun);
                        written.expect("it began").ended = Some(place);
                        if is_durable {
                            medium.settle(|write| write.place == *begun);
                        }
                    }
                    // What had ended when it began.
                    Entry::Flush { device } => self
                        .medium(device)
                        .settle(|write| write.ended.is_some_and(|ended| ended < *begun)),
                    Entry::End(_) | Entry::Mark => {}
                },
                Entry::Flush { .. } | Entry::Mark => {}
            }
        }
        self.at = to;
    }
}

fn options(folder: &Path) -> Options {
    Options::new(&folder.join("meta"), &folder.join("data"))
}

/// Does what a manager says.
fn control(runtime: &Runtime, words: &str) -> bool {
    let id = |text: &str| ThinId(text.parse().expect("an id"));
    let done = match words.split(' ').collect::<Vec<_>>()[..] {
        ["activate", thin, size] => {
            let size = Some(size.parse().expect("a size"));
            runtime.activate(id(thin), Activation { size, origin: None })
        }
        ["deactivate", thin] => {
            let end = Instant::now() + Duration::from_secs(60);
            loop {
                match runtime.deactivate(id(thin)) {
                    // A client that has hung up takes a moment to go.
                    Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
                    other => break other,
                }
            }
        }
        _ => runtime.message(words.parse().expect("a message")),
    };
    done.inspect_err(|e| eprintln!("{words}: {e}")).is_ok()
}

/// What a thin device reads as.
fn content(runtime: &Runtime, id: u64, len: usize) -> Vec<u8> {
    let activation = Activation {
        size: Some(len as u64),
        origin: None,
    };
    runtime.activate(ThinId(id), activation).expect("activated");
    let export = runtime.find(&id.to_string()).expect("exported");
    let (sender, receiver) = mpsc::channel();
    let reply = Replier::new(move |answer| sender.send(answer).expect("somebody waits"));
    export
        .connect()
        .submit(Request::Read { offset: 0, len }, reply);
    let answer = receiver.recv_timeout(Duration::from_secs(60));
    answer.expect("answered").expect("read")
}

/// Puts a load on a new pool, and cuts the power so many times.
fn cut_power(seed: u64, cuts: usize) {
    // In memory, where flushes cost nothing: what they do is the record's business.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| folder());
    let path = folder.path();
    for (name, len) in [("meta", METADATA), ("data", DATA_BLOCKS * BLOCK)] {
        let file = File::create(path.join(name)).expect("made");
        file.set_len(len as u64).expect("long");
    }
    let recorder = Arc::new(Recorder::default());
    let runtime = Runtime::open(&Options {
        create: Some(128),
        interceptor: Some(recorder.clone()),
        ..options(path)
    });
    let runtime = Arc::new(runtime.expect("opened"));
    let len = THIN_BLOCKS * BLOCK;
    for id in 0..2 {
        assert!(control(&runtime, &format!("create_thin {id}")));
        assert!(control(&runtime, &format!("activate {id} {len}")));
    }
    let socket = path.join("nbd");
    let listener = UnixListener::bind(&socket).expect("bound");
    let server =
        Server::start(vec![Listener::Unix(listener)], runtime.clone(), None).expect("started");
    let start = recorder.now();
    let load = Load {
        socket: &socket,
        clock: &|| recorder.now(),
        control: &|words| control(&runtime, words),
        requests: 250,
        snapshots: 12,
        first_snapshot: 2,
    };
    let histories = load.run(&vec![vec![0; len]; 2], seed);
    assert_snapshots(&histories, &format!("seed {seed}"));
    server.stop();
    runtime.stop().expect("stopped");
    drop(runtime);

    let entries = std::mem::take(&mut *recorder.entries());
    let mut playback = Playback {
        entries: &entries,
        at: 0,
        metadata: Medium::new(METADATA),
        data: Medium::new(DATA_BLOCKS * BLOCK),
    };
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut places: Vec<usize> = (0..cuts)
        .map(|_| rng.random_range(start as usize..=entries.len()))
        .collect();
    places.sort_unstable();
    for place in places {
        playback.advance(place);
        let case = format!("seed {seed}, power cut at {place} of {}", entries.len());
        let metadata = playback.metadata.cut(&mut rng);
        assert_eq!(codes_of(metadata.clone()), BTreeSet::new(), "{case}");
        // Other files each time: a process that another test is just starting has the last ones open, too, with their locks.
        for name in ["meta", "data"] {
            fs::remove_file(path.join(name)).expect("removed");
        }
        fs::write(path.join("meta"), metadata).expect("written");
        fs::write(path.join("data"), playback.data.cut(&mut rng)).expect("written");
        let runtime = Runtime::open(&options(path)).unwrap_or_else(|e| panic!("{case}: {e}"));
        runtime.export_all();
        let there: BTreeSet<u64> = runtime
            .exported()
            .expect("a list")
            .iter()
            .map(|id| id.0)
            .collect();
        for (id, history) in &histories {
            let (may, must) = history.may_and_must_exist(place as u64);
            let is_there = there.contains(id);
            assert!(is_there || !must, "{case}: thin device {id} is lost");
            assert!(!is_there || may, "{case}: thin device {id} is there");
            if is_there {
                let found = content(&runtime, *id, len);
                history.assert_survived(&found, place as u64, &format!("{case}, thin device {id}"));
            }
        }
        assert!(control(&runtime, "create_thin 1000"), "{case}");
        runtime.stop().unwrap_or_else(|e| panic!("{case}: {e}"));
        drop(runtime);
        let after = fs::read(path.join("meta")).expect("read");
        assert_eq!(codes_of(after), BTreeSet::new(), "{case}, once it was used");
    }
}

/// Ten loads, each cut at fifty points. `POWER_SEED` runs one of them again, or others.
#[test]
fn whatever_was_acknowledged_as_durable_survives_a_power_cut() {
    let seed = env::var("POWER_SEED").map(|seed| seed.parse().expect("a number"));
    let seeds: BTreeMap<u64, usize> = match seed {
        Ok(seed) => BTreeMap::from([(seed, 500)]),
        Err(_) => (0..10).map(|seed| (seed, 50)).collect(),
    };
    for (seed, cuts) in seeds {
        cut_power(seed, cuts);
    }
}
