//! `thin_replay --manifest`: the volumes of a fleet, or a shard of them, each in a pool of its own.

use std::fs;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, bail};
use thintools::io::write_new;
use thintools::observer::Observer;
use thintools::replay::{FleetPool, Format, Manifest, Report, shard};
use thintools::{Error, ErrorKind};

use super::{outputs, play, saved, trace};
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// Pools that went wrong of which it is said why.
const MOST_TOLD: usize = 20;

/// The options.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// Play the volumes that split left behind, each in a pool of its own, and write a report for each.
    #[arg(
        long,
        value_name = "FILE",
        requires = "reports",
        conflicts_with_all = ["traces", "format", "map", "output", "dry_run", "dump_at_marks", "prefill", "expect", "json", "jsonl", "csv", "html"]
    )]
    pub(super) manifest: Option<PathBuf>,

    /// Play so many pools at once; without it, one for each processor.
    #[arg(long, value_name = "N", requires = "manifest")]
    jobs: Option<NonZero<usize>>,

    /// Pools of several volumes: a volume and the name of its pool, without blanks, on each line. Other volumes have pools of their own.
    #[arg(long, value_name = "FILE", requires = "manifest")]
    pools: Option<PathBuf>,

    /// The folder for reports; it is made if there is none. A report is there whole or not at all.
    #[arg(long, value_name = "DIR", requires = "manifest")]
    reports: Option<PathBuf>,

    /// Go on where an interrupted replay ended: what has a report is not played again.
    #[arg(long, requires = "manifest")]
    resume: bool,

    /// Which part of the fleet to play: 1/4 to 4/4 are all of it, with about as many requests in each.
    #[arg(long, value_name = "I/N", default_value = "1/1", requires = "manifest")]
    shard: Shard,
}

/// A part of a fleet, the first being 1.
#[derive(Clone, Copy, Debug)]
struct Shard {
    number: usize,
    count: usize,
}

impl Args {
    /// Why these options do not go together, if they do not: clap does not ask for what would conflict with the traces.
    pub(super) fn contradiction(&self) -> Option<String> {
        let given = [
            ("--jobs", self.jobs.is_some()),
            ("--pools", self.pools.is_some()),
            ("--reports", self.reports.is_some()),
            ("--resume", self.resume),
            ("--shard", self.shard.count > 1),
        ];
        let alone = given
            .iter()
            .find(|(_, is_given)| *is_given && self.manifest.is_none());
        alone.map(|(option, _)| {
            format!("{option} is for the volumes of a --manifest, and none is named")
        })
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/');
        let numbers = numbers.and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((number, count)) if (1..=count).contains(&number) => Ok(Self { number, count }),
            _ => Err("a shard is I/N, I being 1 to N".into()),
        }
    }
}

/// True if there is a report of this name, which was made with these options.
fn is_finished(path: &Path, options: &[String]) -> anyhow::Result<bool> {
    if fs::symlink_metadata(path).is_err() {
        return Ok(false);
    }
    let advice = "remove it to have it made again";
    let reports = saved::read(&[path.to_owned()]).context(advice)?;
    if let Some((name, _)) = reports.iter().find(|(_, report)| !report.is_complete) {
        bail!("{name} is of a replay that was interrupted; {advice}");
    }
    let others = reports.iter().find_map(|(name, report)| {
        let made_with = report.options.as_ref()?;
        (made_with != options).then_some((name, made_with))
    });
    if let Some((name, made_with)) = others {
        bail!(
            "{name} was made with other options ({}); give the same, or another folder for reports, or {advice}",
            made_with.join(" ")
        );
    }
    Ok(true)
}

/// Plays what of the shard has no report yet.
pub(super) fn run(args: &Args, manifest: &Path, play: &super::args::Args) -> anyhow::Result<Exit> {
    let session = Session::new("Replaying", play.quiet)?;
    let folder = args.reports.as_deref().unwrap_or(Path::new("."));
    let together = match &args.pools {
        Some(path) => fs::read_to_string(path).map_err(|e| Error::io("cannot read the pools", e)),
        None => Ok(String::new()),
    };
    let shown = || {
        args.pools
            .as_ref()
            .map_or_else(String::new, |path| path.display().to_string())
    };
    let together = together.with_context(shown)?;
    let all = Manifest::read(manifest)?
        .pools(&together)
        .with_context(shown)?;
    let of = all.len();
    let all = shard(all, args.shard.number, args.shard.count);
    let here = all.len();
    let mut left = Vec::new();
    for pool in all {
        let path = folder.join(format!("{}.json", pool.stem));
        let is_finished = is_finished(&path, &play.given)?;
        if is_finished && !args.resume {
            bail!(
                "{} exists, and is not overwritten; --resume leaves out what has a report",
                path.display()
            );
        }
        if !is_finished {
            left.push((pool, path));
        }
    }
    fs::create_dir_all(folder)
        .map_err(|e| Error::io(format!("cannot make the folder {}", folder.display()), e))?;
    let is_unexpected = AtomicBool::new(false);
    let written = AtomicUsize::new(0);
    let failed = play_all(&left, args.jobs, play, &session, &is_unexpected, &written);
    if session.is_cancelled() {
        return Ok(Exit::Interrupted);
    }
    if let Some((kind, _)) = failed {
        // Those, too, that were not begun any more.
        let without = left.len() - written.into_inner();
        let message = format!("{without} of {} pools have no report", left.len());
        return Err(Error::new(kind, message).into());
    }
    let Shard { number, count } = args.shard;
    let (played, there) = (left.len(), here - left.len());
    output::stdout_line(&format!(
        "shard {number}/{count}: {here} of {of} pools; {played} played, {there} had a report: {}",
        folder.display()
    ))
    .context("cannot write to standard output")?;
    Ok(match is_unexpected.into_inner() {
        true => Exit::Unexpected,
        false => Exit::Ok,
    })
}

/// Plays all of them, some at a time; how many went wrong, and how the first did. What cannot be read spares the others, a report that cannot
/// be written does not.
fn play_all(
    pools: &[(FleetPool, PathBuf)],
    jobs: Option<NonZero<usize>>,
    play: &super::args::Args,
    session: &Session,
    is_unexpected: &AtomicBool,
    written: &AtomicUsize,
) -> Option<(ErrorKind, usize)> {
    let jobs = jobs.or_else(|| std::thread::available_parallelism().ok());
    let jobs = jobs.map_or(1, NonZero::get).min(pools.len());
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let is_over = AtomicBool::new(false);
    let failed = Mutex::new(None);
    let work = || {
        while !is_over.load(Ordering::Relaxed) && !session.is_cancelled() {
            // The largest come first, so that none of them is left when all others are done.
            let Some((pool, path)) = pools.get(next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            let reports = play_pool(pool, play, session);
            let result = reports.and_then(|reports| {
                let unexpected = reports.iter().any(Report::is_unexpected);
                is_unexpected.fetch_or(unexpected, Ordering::Relaxed);
                if reports.iter().all(|report| report.is_complete) {
                    let result = write_new(path, &mut |out| outputs::json(&reports, out));
                    is_over.fetch_or(result.is_err(), Ordering::Relaxed);
                    result.with_context(|| format!("cannot write {}", path.display()))?;
                    written.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
            if let Err(e) = result {
                let kind = e.downcast_ref().map_or(ErrorKind::Io, Error::kind);
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                let (_, count) = failed.get_or_insert((kind, 0));
                *count += 1;
                // What is wrong with all of them need not be said of each.
                if *count <= MOST_TOLD {
                    output::print_error(&e);
                }
            }
            let done = done.fetch_add(1, Ordering::Relaxed) + 1;
            session.progress("", done as u64, pools.len() as u64);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..jobs {
            scope.spawn(work);
        }
        work();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// An observer of one pool, whose progress is not that of the fleet.
struct OfOne<'a>(&'a Session);

impl Observer for OfOne<'_> {
    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

fn play_pool(
    pool: &FleetPool,
    play: &super::args::Args,
    session: &Session,
) -> anyhow::Result<Vec<Report>> {
    let shown = || pool.name.clone();
    let (_, mut reader) = play
        .trace
        .part_of(&pool.files, Some(Format::Events))
        .with_context(shown)?;
    let mut reports = play::reports(play, &mut *reader, &OfOne(session)).with_context(shown)?;
    for report in &mut reports {
        report.played = Some(trace::played(&pool.files, &Format::Events));
        report.volume = Some(pool.name.clone());
    }
    if reports.iter().any(|report| report.trace.is_truncated) {
        let message = format!(
            "{}: an event file of it is cut off; copy it again, or split the trace again",
            pool.name
        );
        return Err(Error::new(ErrorKind::InvalidDescription, message).into());
    }
    Ok(reports)
}
