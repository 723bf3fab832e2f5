//! `thin_ctl --socket S top`: what a running pool is doing, second by second.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::BinaryBytes;
use serde::Deserialize;
use thintools::pool::WorkerCounts;
use thintools::runtime::IoTotals;
use thintools::runtime::control::{Request, ThinStats};

use crate::exit::Exit;
use crate::output;
use crate::terminal::Terminal;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// Characters of a bar.
const BAR: usize = 30;

/// What is shown of the answer to `stats`.
#[derive(Deserialize)]
struct Stats {
    mode: String,
    pool: Pool,
    worker: WorkerCounts,
    metadata_blocks_read: u64,
    metadata_blocks_written: u64,
    thins: Vec<ThinStats>,
}

#[derive(Deserialize)]
struct Pool {
    transaction_id: u64,
    used_metadata_blocks: u64,
    metadata_blocks: u64,
    used_data_blocks: u64,
    data_blocks: u64,
    /// In sectors.
    data_block_size: u64,
    needs_check: bool,
}

/// A connection to the pool.
struct Asker<'a> {
    socket: &'a Path,
    stream: BufReader<UnixStream>,
}

impl<'a> Asker<'a> {
    fn new(socket: &'a Path) -> anyhow::Result<Self> {
        let shown = socket.display();
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot reach a pool at {shown}"))?;
        Ok(Self {
            socket,
            stream: BufReader::new(stream),
        })
    }

    fn ask(&mut self) -> anyhow::Result<(Instant, Stats)> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Answer {
            Ok(Box<Stats>),
            Error { errno: String, message: String },
        }
        let shown = self.socket.display();
        let hung_up = || format!("the pool at {shown} hung up");
        let request = serde_json::to_string(&Request::Stats)?;
        // It is no pipe of ours that broke, of which nothing would be said.
        if let Err(e) = writeln!(self.stream.get_mut(), "{request}") {
            bail!("{}: {e}", hung_up());
        }
        let mut line = String::new();
        let heard = self.stream.read_line(&mut line).with_context(hung_up)?;
        if heard == 0 {
            bail!(hung_up());
        }
        let answer = serde_json::from_str(&line)
            .with_context(|| format!("the pool at {shown} answered {line:?}"))?;
        match answer {
            Answer::Ok(stats) => Ok((Instant::now(), *stats)),
            Answer::Error { errno, message } => bail!("top: {errno}: {message}"),
        }
    }
}

/// Shows the pool behind `socket` until the user leaves; one look where there is no terminal.
pub(super) fn run(socket: &Path) -> anyhow::Result<Exit> {
    let mut asker = Asker::new(socket)?;
    let mut before = asker.ask()?;
    let Some(terminal) = Terminal::open().context("cannot use the terminal")? else {
        std::thread::sleep(PERIOD);
        for line in lines(socket, &before, &asker.ask()?) {
            output::stdout_line(&line).context("cannot write to standard output")?;
        }
        return Ok(Exit::Ok);
    };
    let mut now = asker.ask()?;
    loop {
        let all = lines(socket, &before, &now);
        let heading = all
            .iter()
            .position(|line| line.trim_start().starts_with("ID "));
        terminal
            .show(&all, |at| at == 0 || Some(at) == heading)
            .context("cannot write to standard output")?;
        if !terminal.wait(PERIOD) {
            return Ok(Exit::Ok);
        }
        let next = asker.ask()?;
        // After a change of size too little time has gone for rates.
        if next.0 - now.0 >= PERIOD / 2 {
            before = std::mem::replace(&mut now, next);
        }
    }
}

/// What happened a second between two looks.
struct Rates {
    seconds: f64,
}

impl Rates {
    /// A counter may begin again.
    fn of(&self, before: u64, now: u64) -> f64 {
        now.saturating_sub(before) as f64 / self.seconds
    }
}

fn lines(socket: &Path, before: &(Instant, Stats), now: &(Instant, Stats)) -> Vec<String> {
    let seconds = (now.0 - before.0).as_secs_f64().max(0.001);
    let rates = Rates { seconds };
    let (before, now) = (&before.1, &now.1);
    let pool = &now.pool;
    let block = pool.data_block_size * 512;
    let check = if pool.needs_check {
        ", needs check"
    } else {
        ""
    };
    let mut lines = vec![
        format!(
            "{}   mode {}{check}   transaction {}   {} thin devices",
            socket.display(),
            now.mode,
            pool.transaction_id,
            now.thins.len()
        ),
        filled("data", (pool.used_data_blocks, pool.data_blocks), block),
        filled(
            "metadata",
            (pool.used_metadata_blocks, pool.metadata_blocks),
            4096,
        ),
        format!(
            "commits {:.0}/s   metadata {}/s read, {}/s written   unmapped {}/s",
            rates.of(before.worker.commits.total(), now.worker.commits.total()),
            bytes(rates.of(before.metadata_blocks_read, now.metadata_blocks_read) * 4096.0),
            bytes(rates.of(before.metadata_blocks_written, now.metadata_blocks_written) * 4096.0),
            bytes(rates.of(before.worker.unmapped, now.worker.unmapped) * block as f64),
        ),
    ];
    let old: BTreeMap<u64, &IoTotals> = before.thins.iter().map(|t| (t.id, &t.io)).collect();
    let nothing = IoTotals::default();
    lines.push(deferrals(&rates, &old, &now.thins));
    lines.push(String::new());
    lines.push(format!(
        "{:>8} {:>10} {:>10} {:>6} {:>9} {:>11} {:>9} {:>11} {:>8} {:>8} {:>8}",
        "ID",
        "SIZE",
        "MAPPED",
        "%",
        "READS/s",
        "READ",
        "WRITES/s",
        "WRITTEN",
        "TRIMS/s",
        "FLUSH/s",
        "DEFER/s"
    ));
    let mut rows: Vec<(f64, String)> = (now.thins.iter())
        .map(|thin| {
            row(
                &rates,
                old.get(&thin.id).copied().unwrap_or(&nothing),
                thin,
                block,
            )
        })
        .collect();
    // The busiest first; those that do nothing by their ids.
    rows.sort_by(|a, b| b.0.total_cmp(&a.0));
    lines.extend(rows.into_iter().map(|(_, line)| line));
    lines
}

/// Why bios were left to the worker, most often first.
fn deferrals(rates: &Rates, old: &BTreeMap<u64, &IoTotals>, thins: &[ThinStats]) -> String {
    let mut all: BTreeMap<&str, f64> = BTreeMap::new();
    for thin in thins {
        for (reason, count) in &thin.io.deferred {
            let before = old.get(&thin.id).and_then(|io| io.deferred.get(reason));
            *all.entry(reason).or_default() += rates.of(before.copied().unwrap_or(0), *count);
        }
    }
    // A sum of nothing would be less than 0.
    let sum = all.values().fold(0.0, |sum, rate| sum + rate);
    let mut all: Vec<_> = all.into_iter().filter(|(_, rate)| *rate >= 0.5).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    let reasons: Vec<_> = (all.iter())
        .map(|(reason, rate)| format!("{reason} {rate:.0}"))
        .collect();
    let colon = if reasons.is_empty() { "" } else { ": " };
    format!("deferred {sum:.0}/s{colon}{}", reasons.join(", "))
}

/// A device's line, and by what it is sorted.
fn row(rates: &Rates, before: &IoTotals, thin: &ThinStats, block: u64) -> (f64, String) {
    let io = &thin.io;
    let deferred = |io: &IoTotals| io.deferred.values().sum();
    let requests = [
        rates.of(before.reads, io.reads),
        rates.of(before.writes, io.writes),
        rates.of(before.trims, io.trims),
        rates.of(before.flushes, io.flushes),
    ];
    let mapped = thin.mapped_blocks.saturating_mul(block);
    let full = thin
        .size
        .filter(|&size| size > 0)
        .map_or_else(String::new, |size| {
            format!("{:.1}%", mapped as f64 * 100.0 / size as f64)
        });
    let line = format!(
        "{:>8} {:>10} {:>10} {full:>6} {:>9.0} {:>11} {:>9.0} {:>11} {:>8.0} {:>8.0} {:>8.0}",
        thin.id,
        thin.size
            .map_or_else(|| "-".into(), |size| bytes(size as f64)),
        bytes(mapped as f64),
        requests[0],
        bytes(rates.of(before.read_bytes, io.read_bytes)) + "/s",
        requests[1],
        bytes(rates.of(before.written_bytes, io.written_bytes)) + "/s",
        requests[2],
        requests[3],
        rates.of(deferred(before), deferred(io)),
    );
    (requests.iter().sum(), line)
}

/// How full something is.
fn filled(name: &str, (used, all): (u64, u64), block: u64) -> String {
    let part = used as f64 / all.max(1) as f64;
    let full = ((part * BAR as f64).round() as usize).min(BAR);
    format!(
        "{name:<8} [{}{}] {:5.1}%   {} of {}   {used}/{all} blocks",
        "#".repeat(full),
        ".".repeat(BAR - full),
        part * 100.0,
        bytes(used.saturating_mul(block) as f64),
        bytes(all.saturating_mul(block) as f64),
    )
}

fn bytes(bytes: f64) -> String {
    BinaryBytes(bytes as u64).to_string()
}
