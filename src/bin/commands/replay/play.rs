//! `thin_replay TRACE`: plays a trace.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use thintools::io::{Access, AlignedBuffer, BlockEngine, make_empty_folder, open_read, write_new};
use thintools::observer::{Observer, Silent};
use thintools::replay::{
    Clock, Fan, Player, Report, TraceReader, cell_pools, play, play_on_threads, schemes,
    side_events, ways as table_of_ways,
};
use thintools::thin::Superblock;
use thintools::tools::check::{CheckOptions, Severity, check};
use thintools::tools::event::Source;
use thintools::tools::{MetadataSource, Selection, TextSink, Trees, text};
use thintools::units::MetadataBlock;

use super::args::{Args, Fill};
use super::outputs::refuse_existing;
use super::start::Below;
use super::ways::Way;
use super::{dry_run, expect};
use crate::exit::Exit;
use crate::session::Session;

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
    let notes = reader.notes();
    if notes.events == 0 && notes.left_out == 0 && notes.skipped > 0 {
        session.say(&format!(
            "warning: none of {} records is a request; is it a trace in the format {format}?",
            notes.skipped
        ));
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
    player
        .make_mapped_devices()
        .context("cannot make the thin devices that the devices of the trace are")?;
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
