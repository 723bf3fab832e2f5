//! Random histories in virtual time: I/O that completes in any order or fails, metadata that cannot be written, crashes, snapshots,
//! suspensions, pools that run full. Whatever a reader finds has to be something that it may find.
//!
//! A history is a list of steps that a seed generates; a step chooses among what is there when it is its turn, so that any part of a
//! history is a history, too. A history that fails is cut down to what it needs to fail. To run one again:
//! `SIMULATION_SEED=N cargo test --release pool::simulation`; `SIMULATION_SEEDS=N` runs more of them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thintools::ErrorKind;
use thintools::io::{BlockEngine, RamEngine};
use thintools::observer::Silent;
use thintools::pdata::txn::LockScheme;
use thintools::pool::{Bio, BioError, Features, Notice, Op, PoolMode, Settings, Thin};
use thintools::thin::PoolMetadata;
use thintools::tools::check::{CheckOptions, check};
use thintools::units::{BLOCK_SIZE, ThinId};

use super::disk::{CHUNK, Disk};
use super::model::Model;
use super::rig::{BLOCK, Done, Rig, table};
use crate::crash::{Fault, Recorder, Request, Step as Written};

const THINS: u64 = 4;
/// Virtual blocks of each device.
const BLOCKS: u64 = 6;
/// I/O is done in quarters of a block.
const QUARTER: u64 = BLOCK / 4;
const METADATA_BLOCKS: usize = 128;
const STEPS: usize = 250;

#[derive(Clone, Copy, Debug)]
enum Step {
    Io {
        op: Op,
        thin: u64,
        quarter: u64,
        quarters: u64,
        is_fua: bool,
    },
    /// Carry out one of the requests that are pending; or it fails.
    CarryOut {
        which: u32,
        fails: bool,
    },
    Pass {
        millis: u64,
    },
    Create {
        id: u64,
    },
    Snapshot {
        id: u64,
        origin: u64,
    },
    Delete {
        id: u64,
    },
    MetadataSnapshot {
        reserve: bool,
    },
    Suspend {
        is_noflush: bool,
    },
    Resume,
    /// One of the next requests to the metadata device fails.
    Fault {
        after: u64,
        is_sync: bool,
    },
    Crash {
        seed: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Setup {
    data_blocks: u64,
    features: Features,
    scheme: LockScheme,
    cells: usize,
    jobs: usize,
    in_one_go: bool,
}

#[derive(Clone, Debug)]
struct History {
    setup: Setup,
    steps: Vec<Step>,
}

fn generate(seed: u64) -> History {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut one_in = |n: u32| rng.random_ratio(1, n);
    let features = Features {
        no_discard_passdown: one_in(3),
        error_if_no_space: one_in(3),
        skip_block_zeroing: one_in(10),
        ..Features::default()
    };
    let (is_scarce, has_faults) = (one_in(4), one_in(2));
    let setup = Setup {
        data_blocks: rng.random_range(6..30),
        features,
        scheme: LockScheme::ALL[rng.random_range(0..5)],
        cells: if is_scarce { 0 } else { 64 },
        jobs: if is_scarce { 2 } else { 64 },
        in_one_go: seed % 2 == 1,
    };
    let steps = (0..STEPS).map(|_| step(&mut rng, has_faults)).collect();
    History { setup, steps }
}

/// The scheme of a history and its I/O alone: what, to which device, sector and sectors.
pub(crate) fn ios_of(seed: u64) -> (LockScheme, Vec<(Op, u64, u64, u64)>) {
    let history = generate(seed);
    let ios = history.steps.iter().filter_map(|step| match *step {
        Step::Io {
            op,
            thin,
            quarter,
            quarters,
            ..
        } => Some((op, thin, quarter * QUARTER, quarters * QUARTER)),
        _ => None,
    });
    (history.setup.scheme, ios.collect())
}

fn step(rng: &mut SmallRng, has_faults: bool) -> Step {
    let id = rng.random_range(0..THINS);
    match rng.random_range(0..200) {
        0..70 => {
            let op = match rng.random_range(0..10) {
                0..5 => Op::Write,
                5..8 => Op::Read,
                8 => Op::Discard,
                _ => Op::Flush,
            };
            let quarter = rng.random_range(0..4 * BLOCKS);
            let quarters = match op {
                Op::Flush => 0,
                Op::Discard => rng.random_range(1..=4 * BLOCKS - quarter),
                _ if quarter.is_multiple_of(4) && rng.random_ratio(1, 2) => 4,
                _ => rng.random_range(1..=4 - quarter % 4),
            };
            Step::Io {
                op,
                thin: id,
                quarter,
                quarters,
                is_fua: op == Op::Write && rng.random_ratio(1, 8),
            }
        }
        70..160 => Step::CarryOut {
            which: rng.random(),
            fails: has_faults && rng.random_ratio(1, 200),
        },
        160..170 => Step::Pass {
            millis: [1, 300, 1100, 70_000][rng.random_range(0..4)],
        },
        170..176 => Step::Create { id },
        176..184 => Step::Snapshot {
            id,
            origin: rng.random_range(0..THINS),
        },
        184..188 => Step::Delete { id },
        188..190 => Step::MetadataSnapshot {
            reserve: rng.random(),
        },
        190..192 => Step::Suspend {
            is_noflush: rng.random(),
        },
        192..196 => Step::Resume,
        196 if has_faults => Step::Fault {
            after: rng.random_range(0..12),
            is_sync: rng.random_ratio(1, 4),
        },
        197..199 => Step::Crash { seed: rng.random() },
        _ => Step::Pass { millis: 5 },
    }
}

/// A bio that has not ended.
#[derive(Debug)]
struct Submitted {
    device: u64,
    op: Op,
    chunks: std::ops::Range<u64>,
    begun: u64,
    is_fua: bool,
}

/// A message that was not answered.
#[derive(Debug)]
struct Asked {
    step: Step,
    begun: u64,
    /// The device that it makes a snapshot of is not about to be another one.
    is_clear: bool,
}

struct Device {
    thin: Arc<Thin>,
    model: Model,
    /// It was deleted, or not: nobody can say what is in it.
    is_unknown: bool,
}

/// A history that is being run.
struct Run {
    setup: Setup,
    rig: Rig,
    engine: Arc<Recorder>,
    devices: BTreeMap<u64, Device>,
    submitted: BTreeMap<u64, Submitted>,
    asked: BTreeMap<u64, Asked>,
    /// A suspension that was not answered, or was.
    suspension: Option<(u64, bool)>,
    now: u64,
    next: u64,
    /// When the metadata failed last: writes that were under way then may have gone to a block that is not mapped any more.
    lost_at: u64,
    /// Something that failed may have left blocks that nobody refers to.
    may_leak: bool,
}

fn settings(setup: &Setup) -> Settings {
    Settings {
        scheme: setup.scheme,
        cells: setup.cells,
        jobs: setup.jobs,
        joins_discards: setup.in_one_go,
        zeroes_with_write: setup.in_one_go,
        ..Settings::new(table(setup.features))
    }
}

impl Run {
    fn new(setup: Setup) -> Self {
        let empty = RamEngine::new(METADATA_BLOCKS);
        let empty = Arc::new(empty);
        let mut metadata = PoolMetadata::format(Arc::clone(&empty) as _, BLOCK as u32, 1 << 20)
            .expect("formatted");
        metadata.resize_data(setup.data_blocks).expect("resized");
        metadata.commit().expect("committed");
        drop(metadata);
        let image = Arc::into_inner(empty)
            .expect("nobody else has it")
            .into_bytes();
        let engine = Arc::new(Recorder::new(&image));
        Self {
            rig: start(&engine, Disk::used(), &setup).expect("started"),
            setup,
            engine,
            devices: BTreeMap::new(),
            submitted: BTreeMap::new(),
            asked: BTreeMap::new(),
            suspension: None,
            now: 1,
            next: 1_000_000,
            lost_at: 0,
            may_leak: false,
        }
    }

    fn step(&mut self, step: Step) {
        self.now += 1;
        match step {
            Step::Io {
                op,
                thin,
                quarter,
                quarters,
                is_fua,
            } => {
                self.submit(op, thin, quarter, quarters, is_fua);
            }
            Step::CarryOut { which, fails } => {
                let pending = self.rig.pending.len();
                if pending > 0 {
                    self.may_leak |= fails;
                    let result = if fails { Err(BioError::Io) } else { Ok(()) };
                    self.rig.carry_out(which as usize % pending, result);
                }
            }
            Step::Pass { millis } => {
                self.rig.now += Duration::from_millis(millis);
                self.rig.tell(thintools::pool::Event::Work);
            }
            Step::Create { id } => self.ask(step, &format!("create_thin {id}")),
            Step::Snapshot { id, origin } => self.ask(step, &format!("create_snap {id} {origin}")),
            Step::Delete { id } => {
                let is_busy = self.submitted.values().any(|s| s.device == id)
                    || self
                        .asked
                        .values()
                        .any(|a| matches!(a.step, Step::Snapshot { origin, .. } if origin == id));
                if let Some(device) = self.devices.get(&id)
                    && !is_busy
                {
                    self.rig.worker.close_thin(&device.thin);
                }
                self.ask(step, &format!("delete {id}"));
            }
            Step::MetadataSnapshot { reserve: true } => self.ask(step, "reserve_metadata_snap"),
            Step::MetadataSnapshot { reserve: false } => self.ask(step, "release_metadata_snap"),
            Step::Suspend { is_noflush } => {
                if self.suspension.is_none() {
                    self.suspension = Some((self.rig.suspend(is_noflush), false));
                }
            }
            Step::Resume => {
                if let Some((_, true)) = self.suspension {
                    self.suspension = None;
                    // The metadata may be failing just now.
                    self.rig.resume_later();
                }
            }
            Step::Fault { after, is_sync } => {
                let request = if is_sync {
                    Request::Sync
                } else {
                    Request::Write
                };
                self.engine.set_faults(&[Fault::once(request, after)]);
                self.may_leak = true;
            }
            Step::Crash { seed } => self.crash(seed),
        }
        self.look();
    }

    fn ask(&mut self, step: Step, message: &str) {
        let tag = self.rig.send(message);
        let begun = self.now;
        let is_about = |asked: &Asked, of| match asked.step {
            Step::Create { id } | Step::Snapshot { id, .. } | Step::Delete { id } => id == of,
            _ => false,
        };
        let is_clear = match step {
            Step::Snapshot { origin, .. } => {
                self.devices.contains_key(&origin)
                    && !self.asked.values().any(|asked| is_about(asked, origin))
            }
            _ => true,
        };
        let asked = Asked {
            step,
            begun,
            is_clear,
        };
        self.asked.insert(tag, asked);
    }

    fn submit(&mut self, op: Op, device: u64, quarter: u64, quarters: u64, is_fua: bool) {
        let is_closed = |a: &Asked| matches!(a.step, Step::Delete { id } if id == device);
        if self.asked.values().any(is_closed) {
            return;
        }
        let Some(to) = self.devices.get_mut(&device) else {
            return;
        };
        let (sector, sectors) = (quarter * QUARTER, quarters * QUARTER);
        let mut chunks = sector / CHUNK..(sector + sectors) / CHUNK;
        if op == Op::Discard {
            let per_block = BLOCK / CHUNK;
            let begin = chunks.start.next_multiple_of(per_block);
            chunks = begin..(chunks.end / per_block * per_block).max(begin);
        }
        self.next += 1;
        let bio = match op {
            Op::Flush => Bio::flush(self.next),
            _ if is_fua => Bio::new(self.next, op, sector, sectors).with_fua(),
            _ => Bio::new(self.next, op, sector, sectors),
        };
        if matches!(op, Op::Write | Op::Discard) {
            let is_discard = op == Op::Discard;
            to.model
                .begin(self.next, chunks.clone(), self.now, is_discard);
        }
        self.submitted.insert(
            self.next,
            Submitted {
                device,
                op,
                chunks,
                begun: self.now,
                is_fua,
            },
        );
        let thin = Arc::clone(&to.thin);
        self.rig.submit_bio(&thin, bio);
    }

    /// Takes in what has come of the last step.
    fn look(&mut self) {
        // A read may have ended after the metadata failed in the same step.
        let is_read = |id| {
            self.submitted
                .get(&id)
                .is_some_and(|bio| bio.op == Op::Read)
        };
        let all = std::mem::take(&mut self.rig.done);
        let (reads, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.into_iter().partition(|(id, _)| is_read(*id));
        self.ended(others);
        for notice in std::mem::take(&mut self.rig.notices) {
            if let Notice::MetadataFailed(_) = notice {
                self.may_leak = true;
                self.lost_at = self.now;
                self.devices.values_mut().for_each(|d| d.model.doubt());
            }
        }
        self.ended(reads);
        for tag in std::mem::take(&mut self.rig.answered) {
            let Some(answer) = self.rig.answers.remove(&tag) else {
                continue;
            };
            let is_lost = answer.as_ref().is_err_and(|e| e.kind() == ErrorKind::Io);
            self.answered(tag, answer.is_ok(), is_lost);
        }
    }

    fn ended(&mut self, bios: BTreeMap<u64, Done>) {
        for (id, done) in bios {
            let bio = self
                .submitted
                .remove(&id)
                .expect("a bio that was submitted");
            let Some(device) = self.devices.get_mut(&bio.device) else {
                continue;
            };
            let model = &mut device.model;
            match (bio.op, done.result) {
                (_, Err(BioError::Requeue)) => model.forget(id),
                (_, Err(error)) => assert_ne!(error, BioError::Invalid),
                (Op::Write | Op::Discard, Ok(())) if bio.begun <= self.lost_at => {}
                (Op::Write, Ok(())) => model.end(id, bio.chunks, self.now, bio.is_fua),
                (Op::Discard, Ok(())) => model.end(id, bio.chunks, self.now, false),
                (Op::Flush, Ok(())) => model.flushed(bio.begun, self.now),
                (Op::Read, Ok(())) if device.is_unknown => {}
                (Op::Read, Ok(())) => {
                    assert_eq!(done.content.len() as u64, bio.chunks.end - bio.chunks.start);
                    for (chunk, tag) in bio.chunks.zip(done.content) {
                        let may_find = model.may_find(chunk, bio.begun);
                        let is_ground =
                            self.setup.features.skip_block_zeroing && may_find.contains(&0);
                        assert!(
                            may_find.contains(&tag) || is_ground,
                            "device {}, chunk {chunk}: read {tag}, may be {may_find:?}",
                            bio.device
                        );
                    }
                }
            }
        }
    }

    fn answered(&mut self, tag: u64, is_ok: bool, is_lost: bool) {
        if let Some((asked, is_answered)) = &mut self.suspension
            && *asked == tag
        {
            *is_answered = true;
        }
        let Some(Asked {
            step,
            begun,
            is_clear,
        }) = self.asked.remove(&tag)
        else {
            return;
        };
        // A commit whose last flush failed may have been done all the same.
        let is_there = |id| {
            let there = |pool: &PoolMetadata| pool.details(ThinId(id)).is_ok();
            self.rig.pool.inspect(there)
        };
        let is_ok = match step {
            Step::Create { id } | Step::Snapshot { id, .. } => {
                is_ok || is_lost && is_there(id) && !self.devices.contains_key(&id)
            }
            Step::Delete { id } => is_ok || is_lost && !is_there(id),
            _ => is_ok,
        };
        match step {
            Step::Create { id } if is_ok => self.open(id, Model::default()),
            Step::Snapshot { id, origin } if is_ok => {
                let of_origin = self.devices.get(&origin);
                let is_unknown = !is_clear || of_origin.is_some_and(|d| d.is_unknown);
                let model = of_origin.map_or_else(Model::default, |d| d.model.snapshot(begun));
                self.open(id, model);
                if let Some(device) = self.devices.get_mut(&id) {
                    device.is_unknown = is_unknown;
                }
            }
            Step::Delete { id } if is_ok => {
                self.devices.remove(&id);
            }
            Step::Delete { id } => {
                // It was closed to be deleted. In mode fail nothing can be opened again, and the closed one gives errors.
                if let Some(device) = self.devices.get_mut(&id)
                    && let Ok(thin) = self.rig.worker.open_thin(ThinId(id), None)
                {
                    device.thin = thin;
                    device.is_unknown |= is_lost;
                }
            }
            _ => {}
        }
    }

    fn open(&mut self, id: u64, model: Model) {
        // In mode fail nothing can be opened.
        if let Ok(thin) = self.rig.worker.open_thin(ThinId(id), None) {
            let is_unknown = false;
            let device = Device {
                thin,
                model,
                is_unknown,
            };
            self.devices.insert(id, device);
        }
    }

    fn crash(&mut self, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let image = self.crashed_image(&mut rng);
        let mut damages = damages(&image);
        damages.retain(|d| !(self.may_leak && d.contains("leak")));
        assert!(damages.is_empty(), "after a crash: {damages:?}");
        let disk = self.rig.disk.clone().crash(|| rng.random());
        self.engine = Arc::new(Recorder::new(&image));
        self.rig = start(&self.engine, disk, &self.setup).expect("what a crash leaves can be used");
        self.suspension = None;
        self.submitted.clear();
        let asked = std::mem::take(&mut self.asked);
        let before = std::mem::take(&mut self.devices);
        let there: Vec<u64> = self.rig.pool.inspect(|pool| {
            pool.devices()
                .expect("read")
                .iter()
                .map(|id| id.0)
                .collect()
        });
        let in_doubt = |id: u64| {
            asked.values().any(|a| match a.step {
                Step::Create { id: new } | Step::Snapshot { id: new, .. } => new == id,
                Step::Delete { id: old } => old == id,
                _ => false,
            })
        };
        for id in 0..THINS {
            let is_there = there.contains(&id);
            assert!(
                is_there == before.contains_key(&id) || in_doubt(id),
                "device {id} is there after a crash: {is_there}"
            );
            if !is_there {
                continue;
            }
            self.open(id, Model::default());
            let thin = Arc::clone(&self.devices[&id].thin);
            for block in 0..BLOCKS {
                let found = self.rig.read(&thin, block * BLOCK, BLOCK).expect("read");
                for (chunk, tag) in (block * BLOCK / CHUNK..).zip(found) {
                    if let Some(device) = before.get(&id).filter(|d| !in_doubt(id) && !d.is_unknown)
                    {
                        let may_be = device.model.may_survive(chunk);
                        let is_ground =
                            self.setup.features.skip_block_zeroing && may_be.contains(&0);
                        assert!(
                            may_be.contains(&tag) || is_ground,
                            "after a crash, device {id}, chunk {chunk}: {tag}, may be {may_be:?}"
                        );
                    }
                    self.devices
                        .get_mut(&id)
                        .expect("opened")
                        .model
                        .is(chunk, tag);
                }
            }
        }
        self.rig.done.clear();
    }

    /// The metadata as a crash leaves it: of what was written since the last flush, anything.
    fn crashed_image(&self, rng: &mut SmallRng) -> Vec<u8> {
        let mut image = self.engine.before();
        let steps = self.engine.steps();
        let last_sync = steps.iter().rposition(|s| matches!(s, Written::Sync));
        for (at, step) in steps.iter().enumerate() {
            if let Written::Write(block, data) = step
                && (last_sync.is_some_and(|sync| at < sync) || rng.random())
            {
                image[*block as usize * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(data);
            }
        }
        image
    }

    /// Lets everything end, and looks whether it did.
    fn finish(&mut self) {
        self.engine.set_faults(&[]);
        for _ in 0..8 {
            self.now += 1;
            self.rig.settle();
            self.look();
            if let Some((_, true)) = self.suspension {
                self.suspension = None;
                self.rig.resume_later();
                self.rig.settle();
                self.look();
            }
            self.rig.now += Duration::from_secs(61);
            self.rig.tell(thintools::pool::Event::Work);
        }
        self.rig.settle();
        self.look();
        assert!(
            self.submitted.is_empty(),
            "bios that never end: {:?}",
            self.submitted
        );
        assert!(
            self.asked.is_empty(),
            "messages without an answer: {:?}",
            self.asked
        );
        assert!(self.rig.pool.is_idle(), "something is held or in flight");
        if self.rig.pool.mode() < PoolMode::ReadOnly {
            self.rig.commit().expect("committed");
            let damages = damages(&self.engine.contents());
            let bad: Vec<&String> = damages
                .iter()
                .filter(|d| !(self.may_leak && d.contains("leak")))
                .collect();
            assert!(bad.is_empty(), "{bad:?}");
        }
    }
}

fn start(engine: &Arc<Recorder>, disk: Disk, setup: &Setup) -> thintools::Result<Rig> {
    let metadata = PoolMetadata::open(Arc::clone(engine) as Arc<dyn BlockEngine>, 1 << 20)?;
    Rig::on(metadata, disk, setup.data_blocks, settings(setup))
}

/// What the check finds, but for what is no damage.
fn damages(image: &[u8]) -> Vec<String> {
    let engine = RamEngine::from_bytes(image.to_vec());
    let checked = check(&engine, &CheckOptions::default(), &Silent).expect("memory");
    let names = checked
        .report
        .damages
        .iter()
        .map(|d| d.code.name().to_string());
    names
        .filter(|n| !["metadata-full", "needs-check"].contains(&n.as_str()))
        .collect()
}

fn run(history: &History) {
    let mut run = Run::new(history.setup);
    run.step(Step::Create { id: 0 });
    run.step(Step::Create { id: 1 });
    for &step in &history.steps {
        run.step(step);
    }
    run.finish();
}

fn failure(history: &History) -> Option<String> {
    let result = catch_unwind(AssertUnwindSafe(|| run(history)));
    result.err().map(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic
            .downcast_ref::<&str>()
            .map_or("a panic", |t| t)
            .to_string(),
    })
}

/// Leaves out steps as long as it still fails.
fn shrink(mut history: History) -> History {
    let mut size = history.steps.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at < history.steps.len() {
            let mut shorter = history.clone();
            shorter
                .steps
                .drain(at..(at + size).min(history.steps.len()));
            match failure(&shorter) {
                Some(_) => history = shorter,
                None => at += size,
            }
        }
        size /= 2;
    }
    history
}

fn run_seed(seed: u64) {
    let history = generate(seed);
    let Some(text) = failure(&history) else {
        return;
    };
    let short = shrink(history);
    let again = failure(&short).unwrap_or(text);
    panic!(
        "seed {seed}: {again}\n{:?}\n{}\nrun it again: SIMULATION_SEED={seed} cargo test --release pool::simulation",
        short.setup,
        short
            .steps
            .iter()
            .map(|s| format!("  {s:?}\n"))
            .collect::<String>()
    );
}

fn of_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_is_read_may_be_read() {
    if let Some(seed) = of_environment("SIMULATION_SEED") {
        return run_seed(seed);
    }
    let first = of_environment("SIMULATION_FIRST").unwrap_or(0);
    let seeds = of_environment("SIMULATION_SEEDS").unwrap_or(600);
    (first..first + seeds).for_each(run_seed);
    println!("{seeds} histories of {STEPS} steps from seed {first} on");
}
