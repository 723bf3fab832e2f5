//! The files of a blktrace: `name.blktrace.0`, `name.blktrace.1` and so on, each perhaps compressed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

const SUFFIXES: [&str; 4] = [".gz", ".zst", ".xz", ".bz2"];
const KIND: &str = ".blktrace";

/// Files that belong together.
pub(super) struct Group {
    pub(super) paths: Vec<PathBuf>,
    /// They are a blktrace, one file for each processor.
    pub(super) is_processors: bool,
    /// A warning about files that should be there.
    pub(super) missing: Option<String>,
}

impl Group {
    /// The groups that `paths` are of, each once.
    pub(super) fn of(paths: &[PathBuf]) -> Result<Vec<Self>> {
        let mut bases: Vec<PathBuf> = Vec::new();
        let mut groups = Vec::new();
        for path in paths {
            let Some(base) = base(path) else {
                groups.push(Self::single(path));
                continue;
            };
            if bases.contains(&base) {
                continue;
            }
            let files = siblings(&base)?;
            if files.is_empty() {
                groups.push(Self::single(path));
                continue;
            }
            let last = files.keys().next_back().copied().unwrap_or(0);
            let missing = (files.len() as u64) < u64::from(last) + 1;
            let missing = missing.then(|| {
                let gone = (0..last).find(|cpu| !files.contains_key(cpu)).unwrap_or(0);
                format!(
                    "the trace has no file {}.{gone}: what processor {gone} did is missing",
                    base.display()
                )
            });
            groups.push(Self {
                paths: files.into_values().collect(),
                is_processors: true,
                missing,
            });
            bases.push(base);
        }
        Ok(groups)
    }

    fn single(path: &Path) -> Self {
        Self {
            paths: vec![path.into()],
            is_processors: false,
            missing: None,
        }
    }
}

/// The path up to `.blktrace` that a path may stand for; none if it is a file of another kind.
fn base(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    if let Some((base, _)) = processor(name) {
        return Some(path.with_file_name(base));
    }
    if path.exists() || name == "-" {
        return None;
    }
    let name = name.strip_suffix(KIND).unwrap_or(name);
    Some(path.with_file_name(format!("{name}{KIND}")))
}

/// Splits `name.blktrace.3.gz` into `name.blktrace` and 3.
fn processor(name: &str) -> Option<(&str, u16)> {
    let plain = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix));
    let (base, cpu) = plain.unwrap_or(name).rsplit_once('.')?;
    let is_number = cpu.bytes().all(|b| b.is_ascii_digit());
    (base.ends_with(KIND) && is_number).then(|| Some((base, cpu.parse().ok()?)))?
}

/// The files beside each other, by processor.
fn siblings(base: &Path) -> Result<BTreeMap<u16, PathBuf>> {
    let folder = match base.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let failed = |e| Error::io(format!("cannot list {}", folder.display()), e);
    let mut files = BTreeMap::new();
    for entry in folder.read_dir().map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some((its, cpu)) = name.to_str().and_then(processor) else {
            continue;
        };
        if base.file_name() == Some(its.as_ref()) {
            // Of a file and its compressed copy the shorter name comes first.
            let path = base.with_file_name(&name);
            let kept = files.entry(cpu).or_insert_with(|| path.clone());
            if path < *kept {
                *kept = path;
            }
        }
    }
    Ok(files)
}
