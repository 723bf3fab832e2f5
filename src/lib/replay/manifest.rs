//! The list of a fleet's volumes that stands beside their event files, and what is played of it together.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// The name of this form of the manifest, for programs that read it.
pub const FLEET_SCHEMA: &str = "thintools-fleet/1";
/// The name of the manifest in its folder.
pub const MANIFEST: &str = "manifest.jsonl";
/// What names of event files end with.
const SUFFIX: &str = ".events.zst";
/// Many times what the most devices of a trace need.
const MAX_MANIFEST: u64 = 256 << 20;
/// As much of a name as is in that of a file.
const SHOWN: usize = 80;

/// A volume: a line of the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// [`FLEET_SCHEMA`].
    pub schema: String,
    /// Its name, as the trace has it.
    pub volume: String,
    /// Event files beside the manifest that belong together: first its own, then that of the control events, if there are any.
    pub files: Vec<String>,
    /// Requests.
    pub events: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Writes, and writes of zeros.
    pub writes: u64,
    /// Discards.
    pub discards: u64,
    /// Flushes without data.
    pub flushes: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Nanoseconds from the start of the trace to the first request.
    pub first_ns: u64,
    /// To the last one.
    pub last_ns: u64,
    /// The sector behind the last one that is asked for.
    pub end_sector: u64,
    /// Bytes of its own file.
    pub file_bytes: u64,
}

/// A manifest that was read.
#[derive(Clone, Debug)]
pub struct Manifest {
    folder: PathBuf,
    volumes: Vec<Volume>,
}

/// Volumes that are played through one pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetPool {
    /// What the pool, or its only volume, is called.
    pub name: String,
    /// The same as the beginning of a file's name; no two pools of a manifest have the same.
    pub stem: String,
    /// Its event files.
    pub files: Vec<PathBuf>,
    /// Requests in them.
    pub events: u64,
}

/// A name as part of that of a file: nothing in it means something to a file system or a shell, and it is not long.
fn plain(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let plain = name.chars().map(|c| if is_plain(c) { c } else { '_' });
    plain.take(SHOWN).collect()
}

/// The name of the event file of a trace's device; the number keeps names apart that become alike.
pub(super) fn file_name(number: usize, device: &str) -> String {
    format!("{number:05}-{}{SUFFIX}", plain(device))
}

/// The name of the event file of the control events: no device has its number.
pub(super) fn control_file_name() -> String {
    format!("control{SUFFIX}")
}

/// Writes the manifest of a folder.
pub(super) fn write(folder: &Path, volumes: &[Volume]) -> Result<()> {
    let path = folder.join(MANIFEST);
    let mut fill = |out: &mut dyn Write| {
        let cannot = |e| Error::io(format!("cannot write {}", path.display()), e);
        for volume in volumes {
            serde_json::to_writer(&mut *out, volume).map_err(|e| cannot(e.into()))?;
            out.write_all(b"\n").map_err(cannot)?;
        }
        Ok(())
    };
    crate::io::write_new(&path, &mut fill)
}

fn wrong(path: &Path, line: usize, fault: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::InvalidDescription,
        format!("{}, line {}: {fault}", path.display(), line + 1),
    )
}

impl Manifest {
    /// Reads a manifest. The event files are looked for beside it.
    ///
    /// # Errors
    /// `Io`; `InvalidDescription` with the line: no volume, a volume or file that stands twice, files that are not beside it.
    pub fn read(path: &Path) -> Result<Self> {
        let cannot = |e| Error::io(format!("cannot read the manifest {}", path.display()), e);
        let mut text = String::new();
        let file = File::open(path).map_err(cannot)?;
        file.take(MAX_MANIFEST)
            .read_to_string(&mut text)
            .map_err(cannot)?;
        if text.len() as u64 == MAX_MANIFEST {
            let message = format!("{} is larger than 256 MiB: no manifest", path.display());
            return Err(Error::new(ErrorKind::InvalidDescription, message));
        }
        let mut volumes = Vec::new();
        let (mut names, mut files) = (HashSet::new(), HashSet::new());
        for (line, text) in text.lines().enumerate() {
            let volume: Volume = serde_json::from_str(text).map_err(|e| wrong(path, line, e))?;
            if volume.schema != FLEET_SCHEMA {
                let fault = format!(
                    "the schema is {:?}; only {FLEET_SCHEMA} is known",
                    volume.schema
                );
                return Err(wrong(path, line, fault));
            }
            let is_here = |file: &String| !file.contains('/') && file.ends_with(SUFFIX);
            let Some(own) = volume
                .files
                .first()
                .filter(|_| volume.files.iter().all(is_here))
            else {
                let fault = format!(
                    "the files {:?} are not event files beside the manifest, NAME{SUFFIX}",
                    volume.files
                );
                return Err(wrong(path, line, fault));
            };
            if !names.insert(volume.volume.clone()) || !files.insert(own.clone()) {
                let fault = format!(
                    "the volume {:?} or its file {own} stands twice",
                    volume.volume
                );
                return Err(wrong(path, line, fault));
            }
            volumes.push(volume);
        }
        let folder = path.parent().unwrap_or(Path::new("")).into();
        Ok(Self { folder, volumes })
    }

    /// The volumes.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// The pools of the fleet, in the order of their first volumes. `together` has a volume and the name of its pool, without blanks, on
    /// each line; a volume that is not there has a pool of its own.
    ///
    /// # Errors
    /// `InvalidDescription` with the line: a volume that is not in the manifest or stands twice, a name like that of another pool.
    pub fn pools(&self, together: &str) -> Result<Vec<FleetPool>> {
        let known: HashSet<&str> = self.volumes.iter().map(|v| v.volume.as_str()).collect();
        let (mut pool_of, mut stems) = (HashMap::new(), HashMap::new());
        for (number, line) in together.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = |fault: &str| {
                let message = format!("line {}: {line:?}: {fault}", number + 1);
                Error::new(ErrorKind::InvalidDescription, message)
            };
            let words = line.rsplit_once(char::is_whitespace);
            let (volume, pool) = words.ok_or_else(|| bad("no volume and pool"))?;
            let volume = volume.trim_end();
            if !known.contains(volume) {
                return Err(bad("the manifest has no such volume"));
            }
            if pool_of.insert(volume, pool).is_some() {
                return Err(bad("the volume stands twice"));
            }
            let other = *stems.entry(plain(pool)).or_insert(pool);
            if other != pool {
                return Err(bad(&format!(
                    "the report of the pool would have the name of that of {other:?}"
                )));
            }
        }
        let mut pools: Vec<FleetPool> = Vec::new();
        let mut places: HashMap<&str, usize> = HashMap::new();
        for volume in &self.volumes {
            let pool = pool_of.get(volume.volume.as_str()).copied();
            let next = pools.len();
            let place = pool.map_or(next, |pool| *places.entry(pool).or_insert(next));
            if place == next {
                let own = volume.files.first().map_or("", String::as_str);
                pools.push(FleetPool {
                    name: pool.unwrap_or(&volume.volume).into(),
                    stem: match pool {
                        Some(pool) => format!("pool-{}", plain(pool)),
                        None => own.trim_end_matches(SUFFIX).into(),
                    },
                    files: Vec::new(),
                    events: 0,
                });
            }
            let pool = &mut pools[place];
            for file in &volume.files {
                let path = self.folder.join(file);
                // Control events are those of all volumes.
                if !pool.files.contains(&path) {
                    pool.files.push(path);
                }
            }
            pool.events = pool.events.saturating_add(volume.events);
        }
        Ok(pools)
    }
}

/// Those of `pools` that are shard `number` of `count`, the first being 1; the largest come first. Each pool is in one of them, the same
/// one whenever it is asked for, and the shards have about as many events as each other.
pub fn shard(mut pools: Vec<FleetPool>, number: usize, count: usize) -> Vec<FleetPool> {
    pools.sort_by_key(|pool| Reverse(pool.events));
    let shards = 1..=count.min(pools.len());
    let mut least: BinaryHeap<_> = shards.map(|shard| Reverse((0u64, shard))).collect();
    pools.retain(|pool| {
        let Some(mut top) = least.peek_mut() else {
            return false;
        };
        let Reverse((events, shard)) = *top;
        // A pool is work, however little happens in it.
        *top = Reverse((events.saturating_add(pool.events).saturating_add(1), shard));
        shard == number
    });
    pools
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(events: &[u64]) -> Vec<FleetPool> {
        let pool = |(number, &events): (usize, &u64)| FleetPool {
            name: number.to_string(),
            stem: file_name(number, "v"),
            files: Vec::new(),
            events,
        };
        events.iter().enumerate().map(pool).collect()
    }

    #[test]
    fn shards_are_even_and_have_each_pool_once() {
        let all = pools(&[900, 0, 10, 500, 500, 20, 400, 300, 0, 0]);
        for count in [1, 2, 3, 7, 20] {
            let shards: Vec<_> = (1..=count).map(|n| shard(all.clone(), n, count)).collect();
            let mut names: Vec<&str> = shards.iter().flatten().map(|p| p.name.as_str()).collect();
            names.sort_unstable();
            assert_eq!(names.len(), all.len());
            names.dedup();
            assert_eq!(names.len(), all.len());
            let events = |shard: &Vec<FleetPool>| shard.iter().map(|p| p.events).sum::<u64>();
            let most = shards.iter().map(events).max();
            assert!(most <= Some(2630 / count as u64 + 900), "{count}: {most:?}");
        }
    }

    #[test]
    fn names_of_files_are_plain() {
        for name in [
            "",
            "..",
            "a/b",
            "ä\u{202e}",
            "-rf *",
            &"x".repeat(300),
            "a\nb\0",
        ] {
            let file = file_name(7, name);
            assert!(
                file.starts_with("00007-") && file.ends_with(SUFFIX),
                "{file}"
            );
            assert!(
                file.len() < 120 && !file.contains(['/', '\n', '\0', ' ']),
                "{file}"
            );
        }
    }
}
