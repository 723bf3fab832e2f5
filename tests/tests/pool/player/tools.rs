//! The tools that made a metadata device from another, 0.9 and 1.3.3 alike: this project's play the parts of both.

use std::fs;
use std::path::{Path, PathBuf};

use thintools::units::BLOCK_SIZE;

use super::{Command, Player};
use crate::crash::codes_of;
use crate::support::{Image, dump, thintools};

impl Player {
    /// Runs a tool. Those that only look, and those that were refused because the pool was active, have no part to play.
    pub(super) fn tool(&mut self, command: &Command) {
        let text = command.text.trim_start_matches("pdata_tools ");
        let words: Vec<&str> = text.split(' ').collect();
        match words[..] {
            ["thin_dump", device, "-o", file] => {
                let image = Image::from_bytes(&self.meta(device).contents());
                let xml = dump(&[], image.path()).expect(0).out();
                fs::write(self.file(file), xml).expect("written");
            }
            // Version 0.9 cannot read what 1.3.3 dumps, and leaves no superblock.
            ["thin_restore", .., device] if command.has_failed() => {
                self.meta(device).put(&[0; BLOCK_SIZE]);
            }
            ["thin_restore", "-i", file, "-o", device] => {
                let xml = fs::read_to_string(self.file(file)).expect("dumped");
                let blocks = self.metadata_blocks;
                self.meta(device)
                    .put(&Image::restored(&xml, blocks).bytes());
            }
            ["thin_repair", "-i", from, "-o", to] => {
                let input = Image::from_bytes(&self.meta(from).contents());
                let output = Image::empty(self.metadata_blocks);
                let mut call = thintools(["thin_repair", "-i"]);
                call = call.arg(input.path()).arg("-o").arg(output.path());
                call.run().expect(0);
                self.meta(to).put(&output.bytes());
            }
            ["thin_check", device] if self.pool.is_none() && !command.has_failed() => {
                assert!(codes_of(self.meta(device).contents()).is_empty());
            }
            _ => {}
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        let name = Path::new(name).file_name().expect("a file");
        self.files.path().join(name)
    }
}
