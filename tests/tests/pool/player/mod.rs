//! Plays what dmsetup and thinio did to a pool of the kernel on a pool of the engine. It fails where the engine refuses what the kernel
//! did, or the other way round, where other I/O fails, and where reads find something else.

mod command;
mod meta;
mod thinio;
mod tools;

use std::collections::BTreeMap;
use std::sync::Arc;

use tempfile::TempDir;
use thintools::io::BlockEngine;
use thintools::pool::{
    Line, PoolMode, PoolState, PoolStatusLine, PoolTable, Settings, Thin, ThinTable,
};
use thintools::thin::PoolMetadata;
use thintools::units::{BLOCK_SIZE, MetadataBlock};

use super::disk::Disk;
use super::rig::Rig;
use crate::support::folder;
pub(crate) use command::Command;
use meta::Meta;
pub(crate) use thinio::content;

/// The pool while it is active.
pub(crate) struct Active {
    pub(crate) rig: Rig,
    line: Line<PoolTable>,
}

/// A thin device while it is active.
struct Open {
    thin: Arc<Thin>,
    line: Line<ThinTable>,
}

/// A machine of the kernel: its devices, and the pool while there is one.
pub(crate) struct Player {
    lists: BTreeMap<String, String>,
    metadata_blocks: u64,
    /// Metadata devices, by name.
    pub(crate) metadata: BTreeMap<String, Arc<Meta>>,
    /// Minor numbers of dm devices.
    minors: BTreeMap<String, u64>,
    /// Tables that were loaded and wait for the resumption.
    inactive: BTreeMap<String, String>,
    data: Disk,
    is_data_null: bool,
    /// The external origin: its sectors and what is there.
    origin: (u64, Disk),
    pub(crate) pool: Option<Active>,
    thins: BTreeMap<String, Open>,
    /// What the tools wrote.
    files: TempDir,
}

impl Player {
    pub(crate) fn new(lists: BTreeMap<String, String>, metadata_blocks: u64) -> Self {
        Self {
            lists,
            metadata_blocks,
            metadata: BTreeMap::new(),
            minors: BTreeMap::new(),
            inactive: BTreeMap::new(),
            data: Disk::used(),
            is_data_null: false,
            origin: (0, Disk::default()),
            pool: None,
            thins: BTreeMap::new(),
            files: folder(),
        }
    }

    fn rig(&mut self) -> &mut Rig {
        &mut self.pool.as_mut().expect("the pool is active").rig
    }

    /// Major and minor number, as tables show devices.
    fn number(&self, device: &str) -> String {
        match device.strip_prefix("/dev/mapper/") {
            Some(name) => format!("253:{}", self.minors[name]),
            None => {
                let disk = device.strip_prefix("/dev/vd").expect("a disk").as_bytes()[0];
                format!("254:{}", 16 * (disk - b'a'))
            }
        }
    }

    fn meta(&mut self, device: &str) -> Arc<Meta> {
        let blocks = self.metadata_blocks;
        let made = self.metadata.entry(device.to_owned());
        Arc::clone(made.or_insert_with(|| Meta::new(blocks)))
    }

    /// Carries a command out. `waiting` is called when I/O has made no progress for a second.
    pub(crate) fn run(&mut self, command: &Command, waiting: &mut dyn FnMut(&mut Self)) {
        let words: Vec<&str> = command.text.split(' ').collect();
        match words[..] {
            ["dmsetup", "create", name, ..] => self.create(name, command),
            ["dmsetup", "reload", "pool", ..] => self.reload_pool(command),
            ["dmsetup", "reload", name, ..] => {
                self.inactive.insert(name.to_owned(), command.table());
            }
            ["dmsetup", "suspend", .., "pool"] => self.suspend_pool(),
            // The engine itself lets I/O end before it takes a snapshot.
            ["dmsetup", "suspend", ..] => {}
            ["dmsetup", "resume", "pool"] => self.resume_pool(command),
            ["dmsetup", "resume", name] => self.resume(name),
            ["dmsetup", "message", "pool", "0", ref message @ ..] => {
                let message = message.join(" ");
                let result = self.rig().message(message.trim_matches('\''));
                command.expect(result);
            }
            // A mark in the log of writes.
            ["dmsetup", "message", "meta", ..] => {}
            ["dmsetup", "remove", name] if !command.has_failed() => self.remove(name),
            ["dmsetup", "remove", _] => {}
            ["thinio", .., device, "<", list] => {
                let depth = words.iter().position(|&word| word == "-q");
                let depth = depth.map_or(1, |at| words[at + 1].parse().expect("a number"));
                if !command.has_failed() {
                    let tally = self.thinio(device, list, depth, waiting);
                    assert_eq!(tally.line(), command.output[0], "{}", command.text);
                }
            }
            _ => self.tool(command),
        }
    }

    fn create(&mut self, name: &str, command: &Command) {
        let table = command.table();
        let (_, target) = table.split_once(' ').expect("a table");
        let (sectors, target) = target.split_once(' ').expect("a table");
        match target.split(' ').next() {
            Some("thin-pool") => self.create_pool(command),
            Some("thin") => self.open(name, command),
            Some("zero") => self.is_data_null = true,
            _ if name == "meta" => self.meta("/dev/mapper/meta").load(&table),
            Some("linear") => self.origin.0 = sectors.parse().expect("a number"),
            other => panic!("{other:?}"),
        }
        if !command.has_failed() {
            let is_free = |minor: &u64| self.minors.values().all(|used| used != minor);
            let minor = (0..).find(is_free).expect("a number");
            self.minors.insert(name.to_owned(), minor);
        }
    }

    fn create_pool(&mut self, command: &Command) {
        let mut line: Line<PoolTable> = command.table().parse().expect("a table");
        let engine = self.meta(&line.words.metadata_device);
        line.words = self.numbered(line.words);
        let mut first = vec![0; BLOCK_SIZE];
        engine.read(MetadataBlock(0), &mut first).expect("read");
        let opened = match first.iter().all(|&byte| byte == 0) {
            true => PoolMetadata::format(engine, line.words.block_sectors, 1 << 20),
            false => PoolMetadata::open(engine, 1 << 20),
        };
        let settings = Settings {
            can_discard_data: !self.is_data_null,
            ..Settings::new(line.words.clone())
        };
        let data = match self.is_data_null {
            true => Disk::null(),
            false => std::mem::take(&mut self.data),
        };
        let blocks = line.sectors / u64::from(line.words.block_sectors);
        let rig = Rig::on(opened.expect("opened"), data, blocks, settings).expect("started");
        self.pool = Some(Active { rig, line });
        // Where the data device grows from nothing to its size.
        self.rig().resume(None).expect("resumed");
    }

    fn numbered(&self, table: PoolTable) -> PoolTable {
        PoolTable {
            metadata_device: self.number(&table.metadata_device),
            data_device: self.number(&table.data_device),
            ..table
        }
    }

    fn open(&mut self, name: &str, command: &Command) {
        let mut line: Line<ThinTable> = command.table().parse().expect("a table");
        line.words.pool = self.number(&line.words.pool);
        let origin = line.words.origin.take();
        line.words.origin = origin.map(|device| self.number(&device));
        let (sectors, disk) = self.origin.clone();
        let sectors = line.words.origin.is_some().then_some(sectors);
        let rig = self.rig();
        let opened = rig.worker.open_thin(line.words.id, sectors);
        if let Some(thin) = command.expect(opened) {
            rig.origins.insert(thin.number(), disk);
            self.thins.insert(name.to_owned(), Open { thin, line });
        }
    }

    /// The engine refuses a table only when it comes into force.
    fn reload_pool(&mut self, command: &Command) {
        if !command.has_failed() {
            self.inactive.insert("pool".to_owned(), command.table());
            return;
        }
        let line: Line<PoolTable> = command.table().parse().expect("a table");
        let table = self.numbered(line.words);
        let result = self.rig().resume(Some(table));
        command.expect(result);
    }

    fn suspend_pool(&mut self) {
        let rig = self.rig();
        let tag = rig.suspend(false);
        rig.settle();
        rig.answers
            .remove(&tag)
            .expect("an answer")
            .expect("suspended");
    }

    fn resume_pool(&mut self, command: &Command) {
        let table = self.inactive.remove("pool").map(|table| {
            let mut line: Line<PoolTable> = table.parse().expect("a table");
            line.words = self.numbered(line.words);
            line
        });
        let pool = self.pool.as_mut().expect("the pool is active");
        if let Some(line) = &table {
            pool.rig.data_blocks = line.sectors / u64::from(pool.line.words.block_sectors);
        }
        let result = pool.rig.resume(table.clone().map(|line| line.words));
        command.expect(result);
        pool.line = table.unwrap_or(pool.line.clone());
    }

    /// Of anything but the pool.
    fn resume(&mut self, name: &str) {
        let Some(table) = self.inactive.remove(name) else {
            return;
        };
        if name == "meta" {
            self.meta("/dev/mapper/meta").load(&table);
        } else if let Some(open) = self.thins.get_mut(name) {
            let line: Line<ThinTable> = table.parse().expect("a table");
            open.line.sectors = line.sectors;
        }
    }

    fn remove(&mut self, name: &str) {
        self.minors.remove(name);
        if let Some(open) = self.thins.remove(name) {
            self.rig().worker.close_thin(&open.thin);
        }
        if name == "pool" {
            self.suspend_pool();
            self.data = self.pool.take().expect("the pool is active").rig.disk;
        }
    }

    /// Status and table lines of the pool and its devices, as dmsetup prints them, and what the pool's status was made of.
    pub(crate) fn lines(&mut self) -> (Vec<String>, Vec<String>, Option<PoolState>) {
        let Some(pool) = &mut self.pool else {
            return (Vec::new(), Vec::new(), None);
        };
        // A status commits, if it may.
        pool.rig.commit().ok();
        let words = pool.rig.worker.pool_status();
        let state = match &words {
            PoolStatusLine::Pool(state) => Some(state.clone()),
            _ => None,
        };
        let sectors = pool.line.sectors;
        let mut status = vec![format!("pool: {}", Line { sectors, words })];
        let mut tables = vec![format!("pool: {}", pool.line)];
        for (name, open) in &self.thins {
            let sectors = open.line.sectors;
            let words = pool.rig.worker.thin_status(&open.thin);
            status.push(format!("{name}: {}", Line { sectors, words }));
            // In a pool that has failed the table says no more than the status.
            tables.push(match pool.rig.pool.mode() {
                PoolMode::Fail => format!("{name}: {}", Line { sectors, words }),
                _ => format!("{name}: {}", open.line),
            });
        }
        (status, tables, state)
    }
}
