//! `thin_replay TRACE`: plays a trace.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use thintools::io::{
    Access, AlignedBuffer, BlockEngine, OverlayEngine, make_empty_folder, open_read, write_new,
};
use thintools::observer::{Observer, Silent};
use thintools::pdata::txn::LockScheme;
use thintools::pool::{AllocationOrder, Features, PoolTable, Settings};
use thintools::replay::{
    Clock, ControlEvent, DeviceModel, Fan, PlayOptions, Player, Prefill, Prefilled, Report,
    SnapshotSchedule, TraceReader, bytes, cell_pools, play, play_on_threads, schemes, seconds,
    side_events, ways as table_of_ways,
};
use thintools::thin::{PoolMetadata, Superblock};
use thintools::tools::check::{CheckOptions, Severity, check};
use thintools::tools::event::Source;
use thintools::tools::{MetadataSource, Selection, TextSink, Trees, text};
use thintools::units::{BLOCK_SIZE, MAX_METADATA_BLOCKS, MAX_THIN_ID, MetadataBlock, ThinId};

use super::dry_run;
use super::expect;
use super::outputs::{Outputs, refuse_existing};
use super::trace::TraceArgs;
use crate::exit::Exit;
use crate::session::Session;

/// The command line.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) trace: TraceArgs,

    /// Read the trace, say what is in it, and play nothing.
    #[arg(long, conflicts_with_all = ["json", "output", "dump_at_marks"])]
    dry_run: bool,

    /// Begin with the pool that this metadata is of.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["block_size", "metadata_size"])]
    metadata: Option<PathBuf>,

    /// Begin with a new pool, as without --metadata.
    #[arg(long, conflicts_with = "metadata")]
    create: bool,

    /// Size of a data block of a new pool. With commas several: each is tried.
    #[arg(long, value_name = "SIZES", default_value = "64k", value_parser = data_block, value_delimiter = ',')]
    block_size: Vec<u64>,

    /// Memory for blocks of metadata. With commas several: each is tried.
    #[arg(long, value_name = "SIZES", default_value = "32m", value_parser = sectors, value_delimiter = ',')]
    cache: Vec<u64>,

    /// Size of the data device; without it, that of the metadata given, or 1 TiB. The pool of metadata that is given grows to it; one that
    /// is larger is refused.
    #[arg(long, value_name = "SIZE", value_parser = sectors)]
    data_size: Option<u64>,

    /// Size of the metadata device of a new pool.
    #[arg(long, value_name = "SIZE", default_value = "128m", value_parser = sectors)]
    metadata_size: u64,

    /// Free data blocks at which the pool reports that it is low.
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    low_water: u64,

    /// A feature of the pool, by the kernel's word; may be repeated.
    #[arg(long, value_name = "WORD", value_parser = feature)]
    feature: Vec<String>,

    /// Which thin device a device of the trace is, and how large: 252:3=0, or 252:3=0:10g; may be repeated. Without it every device of
    /// the trace becomes a new, empty one, in order, also in the pool of --metadata, unless control events say what they are.
    #[arg(long, value_name = "DEV=ID[:SIZE]", value_parser = mapping)]
    map: Vec<(String, ThinId, Option<u64>)>,

    /// Which blocks are mapped before the trace begins: none, or read-before-write, those that it reads before it writes them. For that
    /// the trace is read twice.
    #[arg(long, value_name = "BLOCKS", value_enum, default_value_t)]
    prefill: Fill,

    /// Largest read or write that the thin device gets at once.
    #[arg(long, value_name = "SECTORS", value_parser = clap::value_parser!(u64).range(1..))]
    max_sectors: Option<u64>,

    /// Control events: on each line a time in seconds and the event. Without --map, and without activate and create_thin among them, the
    /// devices of the trace become thin devices all the same.
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,

    /// Snapshot every device so often. With commas several, or never: each is tried.
    #[arg(long, value_name = "TIMES", value_parser = schedule, value_delimiter = ',')]
    snap_every: Vec<Schedule>,

    /// Keep so many snapshots of each device.
    #[arg(long, value_name = "N", default_value_t = 24, requires = "snap_every")]
    snap_keep: usize,

    /// Locking schemes: 2013, kernel, a, b, optimistic. With commas several: each is tried. Of whatever is given several of, each goes
    /// with each of the others: the trace is read once and played by all of them at the same time (by the clock of threads one after the other), and a table
    /// compares them.
    #[arg(
        long,
        value_name = "SCHEMES",
        default_value = "kernel",
        value_delimiter = ','
    )]
    locks: Vec<LockScheme>,

    /// Whose time it is: virtual, in which one thread plays and the same trace gives the same report; or threads, in which the trace is
    /// played as fast as it goes, on real threads and with real locks, and the data device takes no time.
    #[arg(long, value_name = "CLOCK", default_value = "virtual")]
    clock: Clock,

    /// Take cells one by one, each when it is needed, of a pool of so many, as in 2013: the report says whether they were waited for
    /// in a cycle. With several numbers, and commas, the trace is played with each, and then with cells that are reserved.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(2..=1_048_576))]
    cell_pool: Vec<u32>,

    /// Processors that submit, a thread each by the clock of threads.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    cpus: u16,

    /// Verify that every read finds what was written before, and at the end that every thin device has what it has to have. Beside the
    /// pool there is a model of its data, which takes 8 bytes of memory for each sector of a block that is written in parts; with N it
    /// is of one virtual block in N. By the virtual clock.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    verify: Option<u32>,

    /// Vary how long the modelled data device takes, by up to an eighth and not on average, and so in which order requests end. The same
    /// number gives the same report.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Keep the metadata of the pool at the end in this file, which must not exist.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// At each mark, dump the metadata as NAME.xml into this folder, NAME.2.xml and so on if there are several of a name. It is made if
    /// there is none, and must be empty.
    #[arg(long, value_name = "DIR")]
    dump_at_marks: Option<PathBuf>,

    #[command(flatten)]
    expect: expect::Args,

    #[command(flatten)]
    outputs: Outputs,

    /// Print no progress and no warnings; errors and the report are printed.
    #[arg(short, long)]
    pub(super) quiet: bool,

    /// What of all this was given that a report depends on.
    #[arg(skip)]
    pub(super) given: Vec<String>,
}

/// What is mapped before a trace begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Fill {
    /// Nothing.
    #[default]
    None,
    /// What the trace reads before it writes it.
    ReadBeforeWrite,
}

/// A number with a letter for what it is multiplied by.
fn scaled(text: &str, letters: &[(char, u64)]) -> Result<u64, String> {
    let (digits, scale) = split_letter(text, letters);
    let number: u64 = digits.parse().map_err(|_| {
        format!("{text:?} is not a number with one of the letters that it may have")
    })?;
    number
        .checked_mul(scale)
        .ok_or_else(|| format!("{text} is too large"))
}

/// What is before a letter, and what it is multiplied by.
fn split_letter<'a>(text: &'a str, letters: &[(char, u64)]) -> (&'a str, u64) {
    let scaled = letters
        .iter()
        .find_map(|&(letter, scale)| Some((text.strip_suffix(letter)?, scale)));
    scaled.unwrap_or((text, 1))
}

/// A size in sectors of 512 bytes.
pub(in crate::commands) fn sectors(text: &str) -> Result<u64, String> {
    let letters = [
        ('s', 512),
        ('k', 1 << 10),
        ('m', 1 << 20),
        ('g', 1 << 30),
        ('t', 1 << 40),
    ];
    let bytes = scaled(&text.to_ascii_lowercase(), &letters)?;
    match bytes.is_multiple_of(512) {
        true => Ok(bytes / 512),
        false => Err(format!(
            "{text} is not a whole number of sectors of 512 bytes"
        )),
    }
}

/// A size of data blocks in sectors of 512 bytes.
fn data_block(text: &str) -> Result<u64, String> {
    match sectors(text)? {
        size if size.is_multiple_of(128) && (128..=2_097_152).contains(&size) => Ok(size),
        size => Err(format!(
            "data blocks of {size} sectors; a multiple of 64k up to 1g is possible"
        )),
    }
}

fn feature(word: &str) -> Result<String, String> {
    let known = Features::from_words(&[word]);
    known.map(|_| word.to_owned()).map_err(|e| e.to_string())
}

pub(super) fn time(text: &str) -> Result<Duration, String> {
    let letters = [('s', 1), ('m', 60), ('h', 3600), ('d', 86_400)];
    let (digits, scale) = split_letter(text, &letters);
    // What is a number otherwise, as inf, 1e9 and -0, is no time.
    let is_plain = digits.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let number = digits.parse::<f64>().ok().filter(|_| is_plain);
    let number = number.ok_or_else(|| format!("{text:?} is not a number with s, m, h or d"))?;
    match Duration::try_from_secs_f64(number * scale as f64) {
        Ok(Duration::ZERO) => Err("a time of 0 is no interval".into()),
        Ok(time) if u64::try_from(time.as_nanos()).is_ok() => Ok(time),
        _ => Err(format!("{text} is too long")),
    }
}

fn first_word(text: &str) -> &str {
    text.split_ascii_whitespace().next().unwrap_or_default()
}

/// Time between snapshots; none is never.
#[derive(Clone, Copy, Debug)]
struct Schedule(Option<Duration>);

fn schedule(text: &str) -> Result<Schedule, String> {
    Ok(Schedule(match text {
        "never" => None,
        text => Some(time(text)?),
    }))
}

/// One of the ways in which a trace is played.
#[derive(Clone, Copy, Debug)]
struct Way {
    /// Sectors of 512 bytes.
    block_size: u64,
    scheme: LockScheme,
    /// Sectors of 512 bytes.
    cache: u64,
    snapshots: Option<SnapshotSchedule>,
    /// Cells that are taken one by one; none is that both are reserved.
    cells: Option<u32>,
}

/// `DEV=ID[:SIZE]`
fn mapping(text: &str) -> Result<(String, ThinId, Option<u64>), String> {
    let wrong = || format!("{text:?} is not DEV=ID or DEV=ID:SIZE");
    let (device, thin) = text.rsplit_once('=').ok_or_else(wrong)?;
    let (id, size) = match thin.split_once(':') {
        Some((id, size)) => (id, Some(sectors(size)?)),
        None => (thin, None),
    };
    match id.parse() {
        Ok(id) if id <= MAX_THIN_ID => Ok((device.into(), ThinId(id), size)),
        Ok(id) => Err(format!("thin device {id} is past the last, {MAX_THIN_ID}")),
        Err(_) => Err(wrong()),
    }
}

impl Args {
    /// How a way differs from the others.
    fn name(&self, way: &Way) -> String {
        let mut differs = Vec::new();
        if self.block_size.len() > 1 {
            differs.push(bytes(way.block_size * 512));
        }
        if self.locks.len() > 1 {
            differs.push(way.scheme.to_string());
        }
        if self.cache.len() > 1 {
            differs.push(format!("cache {}", bytes(way.cache.saturating_mul(512))));
        }
        if self.snap_every.len() > 1 {
            differs.push(way.snapshots.map_or("no snapshots".into(), |schedule| {
                let every = schedule.every.as_nanos() as u64;
                format!("snapshots every {}", seconds(every))
            }));
        }
        if self.cell_pool.len() > 1 {
            differs.push(
                way.cells
                    .map_or("cells reserved".into(), |n| format!("{n} cells")),
            );
        }
        differs.join(", ")
    }

    /// All of them, each with how it differs from the others.
    fn ways(&self) -> Vec<(String, Way)> {
        let every: Vec<_> = match self.snap_every.is_empty() {
            true => vec![None],
            false => self.snap_every.iter().map(|schedule| schedule.0).collect(),
        };
        // By comparison with the cells that are reserved.
        let mut pools: Vec<Option<u32>> = self.cell_pool.iter().copied().map(Some).collect();
        if pools.len() != 1 {
            pools.push(None);
        }
        let mut ways = Vec::new();
        for &block_size in &self.block_size {
            for &scheme in &self.locks {
                for &cache in &self.cache {
                    for &every in &every {
                        for &cells in &pools {
                            let keep = self.snap_keep;
                            let way = Way {
                                block_size,
                                scheme,
                                cache,
                                snapshots: every.map(|every| SnapshotSchedule { every, keep }),
                                cells,
                            };
                            ways.push((self.name(&way), way));
                        }
                    }
                }
            }
        }
        ways
    }

    /// Why options do not go together, if they do not.
    pub(super) fn contradiction(&self) -> Option<String> {
        if let Some(wrong) = self.outputs.contradiction() {
            return Some(wrong);
        }
        let is_also = |path: &&PathBuf| self.outputs.files().any(|file| file == path.as_path());
        if let Some(path) = self.output.as_ref().filter(is_also) {
            let path = path.display();
            return Some(format!(
                "{path} is named for the metadata and for the report"
            ));
        }
        if self.clock == Clock::Threads && (self.verify.is_some() || self.seed != 0) {
            return Some("--verify and --seed are for the virtual clock".into());
        }
        let one = self.output.is_some() || self.dump_at_marks.is_some();
        match self.ways().len() {
            2.. if one => {
                return Some("-o and --dump-at-marks are for one way of playing the trace".into());
            }
            ways if ways > MOST_WAYS => {
                let most = format!("{MOST_WAYS} are possible");
                return Some(format!("{ways} ways to play the trace at once; {most}"));
            }
            _ => {}
        }
        let data_size = self.data_size.filter(|_| self.metadata.is_none())?;
        let small = self.block_size.iter().find(|&&size| data_size < size);
        small.map(|block_size| {
            format!("--data-size of {data_size} sectors has no room for a block of {block_size}")
        })
    }

    /// The pool before the trace begins.
    fn start(&self, way: &Way, below: Below) -> anyhow::Result<(Arc<OverlayEngine>, PoolMetadata)> {
        let data_blocks = |size: u64| self.data_size.map(|sectors| sectors / size);
        if let (Some(path), Some(below)) = (&self.metadata, below) {
            let engine = Arc::new(OverlayEngine::over(below));
            let metadata = PoolMetadata::open(Arc::clone(&engine) as _, way.cache(&*engine));
            let shown = || path.display().to_string();
            let mut metadata = metadata.with_context(shown)?;
            let status = metadata.status()?;
            if let Some(blocks) = data_blocks(status.data_block_size.into()) {
                // As the kernel does when the pool is activated.
                if blocks < status.data_blocks {
                    bail!(
                        "--data-size: {blocks} blocks are fewer than the {} that the pool of {} has; give {} or more",
                        status.data_blocks,
                        path.display(),
                        format_args!(
                            "{}s",
                            status
                                .data_blocks
                                .saturating_mul(status.data_block_size.into())
                        )
                    );
                }
                if blocks > status.data_blocks && status.needs_check {
                    bail!(
                        "--data-size: a pool that needs a check does not grow; thin_check --clear-needs-check-flag {}",
                        path.display()
                    );
                }
                metadata.resize_data(blocks)?;
                metadata.commit()?;
            }
            return Ok((engine, metadata));
        }
        let size = u32::try_from(way.block_size).unwrap_or(u32::MAX);
        let blocks = self.metadata_size / 8;
        if blocks > MAX_METADATA_BLOCKS {
            bail!(
                "a pool uses {MAX_METADATA_BLOCKS} blocks of 4 KiB of metadata at most, not {blocks}"
            );
        }
        let engine = Arc::new(OverlayEngine::zeroed(blocks));
        let mut metadata =
            PoolMetadata::format(Arc::clone(&engine) as _, size, way.cache(&*engine))?;
        let blocks = data_blocks(way.block_size).unwrap_or((1 << 31) / way.block_size);
        metadata.resize_data(blocks)?;
        metadata.commit()?;
        Ok((engine, metadata))
    }

    /// `beside` are the events of --events.
    fn options(
        &self,
        metadata: &PoolMetadata,
        way: &Way,
        beside: &[ControlEvent],
    ) -> anyhow::Result<PlayOptions> {
        let says_what_is_what =
            |event: &ControlEvent| ["activate", "create_thin"].contains(&first_word(&event.text));
        let status = metadata.status()?;
        let block_sectors = status.data_block_size;
        let table = PoolTable {
            metadata_device: "metadata".into(),
            data_device: "data".into(),
            block_sectors,
            low_water_blocks: self.low_water,
            features: Features::from_words(&self.feature)?,
        };
        let devices = self.map.iter().cloned();
        let mut settings = Settings {
            scheme: way.scheme,
            ..Settings::new(table)
        };
        if let Some(cells) = way.cells {
            settings.cells = cells as usize;
            settings.allocation_order = AllocationOrder::OneByOne;
        }
        Ok(PlayOptions {
            settings,
            data_blocks: match self.data_size {
                Some(sectors) => sectors / u64::from(block_sectors),
                None => status.data_blocks,
            },
            max_sectors: self.max_sectors,
            cpus: usize::from(self.cpus),
            device: DeviceModel::default(),
            devices: devices.map(|(name, id, size)| (name, (id, size))).collect(),
            makes_devices: self.map.is_empty() && !beside.iter().any(says_what_is_what),
            seed: self.seed,
        })
    }
}

impl Way {
    /// Bytes of cache.
    fn cache(&self, engine: &dyn BlockEngine) -> usize {
        // There is no use for more than all blocks, each with what is noted of it.
        let most = engine.nr_blocks().saturating_mul(BLOCK_SIZE as u64 + 16);
        let bytes = self.cache.saturating_mul(512).min(most);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }
}

impl Args {
    /// Maps what is to be mapped before the trace begins.
    fn prefill(
        &self,
        beside: &[ControlEvent],
        metadata: &mut PoolMetadata,
        options: &mut PlayOptions,
        observer: &dyn Observer,
    ) -> anyhow::Result<Option<Prefilled>> {
        if self.prefill == Fill::None {
            return Ok(None);
        }
        let mut reader = self.trace.open_again()?;
        let prefill = Prefill::of(
            &mut *reader,
            beside.to_vec(),
            metadata,
            &options.devices,
            options.makes_devices,
            observer,
        )?;
        let named = prefill.named().iter();
        options
            .devices
            .extend(named.map(|(name, &id)| (name.clone(), (id, None))));
        Ok(Some(prefill.apply(metadata)?))
    }
}

/// Plays the trace.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let session = Session::new("Replaying", args.quiet)?.heard_out();
    if args.dry_run {
        return dry_run::run(&args.trace, &session);
    }
    let ways = args.ways();
    // Better now than when everything is done.
    args.outputs.refuse_early()?;
    if let Some(path) = &args.output {
        refuse_existing(path)?;
    }
    if let Some(folder) = &args.dump_at_marks {
        make_empty_folder(folder)?;
    }
    if args.prefill != Fill::None || args.clock == Clock::Threads && ways.len() > 1 {
        args.trace.refuse_streams()?;
    }
    let (format, mut reader) = args.trace.open(&session)?;
    if args.metadata.is_some() && args.map.is_empty() && args.events.is_none() {
        session.say(
            "no --map says which thin devices of the pool the trace's devices are: unless the trace does, they are new, empty ones",
        );
    }
    let mut reports = reports(&args, &mut *reader, &session)?;
    for report in &mut reports {
        report.played = Some(args.trace.played(&format));
    }
    for (name, ..) in &args.map {
        if !reader.devices().contains(name) {
            let known = reader.devices().join(", ");
            session.say(&format!(
                "warning: the trace has no device {name}; it has {known}"
            ));
        }
    }
    let text = match &reports[..] {
        [report] => report.to_string(),
        reports => {
            let names = ways.iter().map(|(name, _)| name.clone());
            let named: Vec<_> = names.zip(reports.iter().cloned()).collect();
            let mut text = table_of_ways(&named);
            if args.locks.len() > 1 {
                text.push('\n');
                text.push_str(&schemes(reports));
            }
            if args.cell_pool.len() > 1 {
                text.push_str(&cell_pools(reports));
            }
            text
        }
    };
    args.outputs.write(&reports, &text)?;
    Ok(match reports.iter().all(|r| r.is_complete) {
        false => Exit::Interrupted,
        true if reports.iter().any(Report::is_unexpected) => Exit::Unexpected,
        true => Exit::Ok,
    })
}

/// Plays what `reader` has in every way that was asked for.
pub(super) fn reports(
    args: &Args,
    reader: &mut dyn TraceReader,
    observer: &dyn Observer,
) -> anyhow::Result<Vec<Report>> {
    let below: Below = match &args.metadata {
        Some(path) => Some(open_read(path, Access::Exclusive)?.into()),
        None => None,
    };
    match &args.ways()[..] {
        // Each has the machine to itself, or they would measure each other.
        ways if args.clock == Clock::Threads => {
            let mut reports = Vec::new();
            let mut again;
            for (number, (name, way)) in ways.iter().enumerate() {
                let reader = match number {
                    0 => &mut *reader,
                    _ => {
                        again = args.trace.open_again()?;
                        &mut *again
                    }
                };
                let report = replay(args, way, below.clone(), reader, observer);
                let report = named(report, name)?;
                let is_complete = report.is_complete;
                reports.push(report);
                if !is_complete {
                    break;
                }
            }
            Ok(reports)
        }
        ways => sweep(args, ways, &below, reader, observer),
    }
}

/// The metadata that the pool begins with, which is only read.
type Below = Option<Arc<dyn BlockEngine>>;

/// Ways to play a trace at once: a thread and a pool each.
const MOST_WAYS: usize = 256;

/// Plays the trace in several ways at once.
fn sweep(
    args: &Args,
    ways: &[(String, Way)],
    below: &Below,
    reader: &mut dyn TraceReader,
    observer: &dyn Observer,
) -> anyhow::Result<Vec<Report>> {
    let (fan, shares) = Fan::new(ways.len());
    std::thread::scope(|scope| {
        let mut players = Vec::new();
        for (mut share, (name, way)) in shares.into_iter().zip(ways) {
            let play = move || replay(args, way, below.clone(), &mut share, observer);
            let player = std::thread::Builder::new().spawn_scoped(scope, play)?;
            players.push((name, player));
        }
        let read = fan.hand_out(reader, observer);
        let mut reports = Vec::new();
        for (name, player) in players {
            match player.join() {
                Ok(report) => reports.push(named(report, name)?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        read?;
        Ok(reports)
    })
}

/// Says which way it was that failed, if there is more than one.
fn named(report: anyhow::Result<Report>, name: &str) -> anyhow::Result<Report> {
    match name {
        "" => report,
        name => report.with_context(|| name.to_owned()),
    }
}

fn replay(
    args: &Args,
    way: &Way,
    below: Below,
    reader: &mut dyn TraceReader,
    observer: &dyn Observer,
) -> anyhow::Result<Report> {
    let beside = match &args.events {
        Some(path) => {
            let shown = || path.display().to_string();
            side_events(&fs::read_to_string(path).with_context(shown)?).with_context(shown)?
        }
        None => Vec::new(),
    };
    let (engine, mut metadata) = args.start(way, below.clone())?;
    let mut options = args.options(&metadata, way, &beside)?;
    let prefilled = args.prefill(&beside, &mut metadata, &mut options, observer)?;
    let mut player = Player::new(metadata, options.clone())?;
    if let Some(one_of) = args.verify {
        player.verify(one_of.into())?;
    }
    player.make_mapped_devices()?;
    let mut marks = 0;
    let mut expectations = args.expect.expectations()?;
    let mut dumped = HashSet::new();
    let mut at_control = |player: &Player| {
        let Some(mark) = player.marks().get(marks) else {
            return Ok(());
        };
        marks += 1;
        if let Some(expectations) = &mut expectations {
            expectations.at_mark(player, mark, observer)?;
        }
        let Some(folder) = &args.dump_at_marks else {
            return Ok(());
        };
        let name = file_name(&mark.name);
        let numbered = (2u64..).map(|number| format!("{name}.{number}"));
        let mut names = std::iter::once(name.clone()).chain(numbered);
        let free = names
            .find(|name| !dumped.contains(name))
            .unwrap_or_default();
        dump(&*engine, &folder.join(format!("{free}.xml")))?;
        dumped.insert(free);
        Ok(())
    };
    let play = match args.clock {
        Clock::Virtual => play,
        Clock::Threads => play_on_threads,
    };
    let is_complete = play(
        &mut player,
        reader,
        beside,
        way.snapshots,
        &mut at_control,
        observer,
    )?;
    let mut report = Report::new(&player, &options, reader.notes(), is_complete)?;
    report.device_heat = player.heat_by_device(reader.devices());
    report.prefilled = prefilled;
    report.expected = expectations.map(expect::Expectations::end);
    drop(player);
    let snapshots = way
        .snapshots
        .map(|s| (s.every.as_secs_f64(), s.keep as u64));
    report.setup.snapshots = snapshots;
    report.options = Some(args.given.clone());
    // Whoever wishes to stop does not wish to wait for it.
    if is_complete {
        judge(&*engine, below.as_deref())?;
        report.metadata_is_sound();
    }
    if let Some(path) = &args.output {
        keep(&*engine, path)?;
    }
    Ok(report)
}

/// A name of a mark as that of a file.
pub(super) fn file_name(mark: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let plain = mark.chars().map(|c| if is_plain(c) { c } else { '_' });
    plain.collect()
}

/// The first damage of metadata, if it has any.
fn damage(engine: &dyn BlockEngine) -> thintools::Result<Option<String>> {
    let report = check(engine, &CheckOptions::default(), &Silent)?.report;
    let worst = report.damages.iter().find(|d| d.severity > Severity::Leak);
    Ok(worst.map(ToString::to_string))
}

/// Whatever was played, the metadata is sound, unless that `below`, with which the pool began, was not.
fn judge(engine: &dyn BlockEngine, below: Option<&dyn BlockEngine>) -> anyhow::Result<()> {
    let Some(after) = damage(engine)? else {
        return Ok(());
    };
    let before = below.map(damage).transpose()?.flatten();
    if let Some(before) = before {
        let message = format!(
            "the metadata was damaged before the replay: {before}; see thin_check, and give what thin_repair makes of it"
        );
        return Err(thintools::Error::new(thintools::ErrorKind::Damaged, message).into());
    }
    bail!("the metadata is damaged after the replay, which is a defect: {after}")
}

fn dump(engine: &dyn BlockEngine, path: &Path) -> thintools::Result<()> {
    let superblock = Superblock::read(engine)?;
    let source = MetadataSource {
        engine,
        trees: Trees::read(
            engine,
            &superblock,
            superblock.data_space_map.nr_blocks,
            &Silent,
        )?,
        selection: Selection::default(),
        recovered: None,
        observer: &Silent,
    };
    write_new(path, &mut |out| {
        source.emit(&mut TextSink::new(out, &text::Xml))
    })
}

/// Writes the metadata to a new file.
fn keep(engine: &dyn BlockEngine, path: &Path) -> anyhow::Result<()> {
    write_new(path, &mut |out| {
        let mut block = AlignedBuffer::new(1);
        for number in 0..engine.nr_blocks() {
            let cannot = |e| thintools::Error::io(format!("cannot write block {number}"), e);
            engine
                .read(MetadataBlock(number), block.blocks_mut(1))
                .map_err(cannot)?;
            out.write_all(block.blocks(1)).map_err(cannot)?;
        }
        Ok(())
    })?;
    Ok(())
}
