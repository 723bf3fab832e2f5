//! Each kind of fault that an engine may have is found, and named.

use super::*;
use crate::io::RamEngine;
use crate::pool::{JobId, Source};
use crate::units::DataBlock;
use std::sync::Arc;

const SIZE: u64 = 128;
const ONE: ThinId = ThinId(1);
const TWO: ThinId = ThinId(2);

fn metadata() -> PoolMetadata {
    let engine = Arc::new(RamEngine::new(256));
    let mut metadata = PoolMetadata::format(engine, SIZE as u32, 1 << 20).unwrap();
    metadata.resize_data(100).unwrap();
    metadata.create_thin(ONE).unwrap();
    metadata
}

fn map(metadata: &mut PoolMetadata, id: ThinId, block: u64) -> u64 {
    let data = metadata.alloc_data_block().unwrap().unwrap();
    metadata.insert_block(id, ThinBlock(block), data).unwrap();
    data.0 * SIZE
}

/// What an engine tells the model, one bio at a time.
struct Rig {
    verify: Verify,
    next: u64,
}

impl Rig {
    fn new() -> Self {
        Self::of(Verify::new(&metadata(), SIZE, false, 1).unwrap())
    }

    fn of(verify: Verify) -> Self {
        Self { verify, next: 0 }
    }

    fn bio(&mut self, op: Op, sector: u64, sectors: u64) -> Box<Bio> {
        self.next += 1;
        Box::new(Bio::new(self.next, op, sector, sectors))
    }

    fn end(&mut self, bio: &Bio) {
        self.verify.end(bio, Ok(()));
    }

    /// A request to a thin device that goes to sector `at` of the data device.
    fn request(&mut self, op: Op, id: ThinId, sector: u64, sectors: u64, at: u64) {
        let bio = self.bio(op, sector, sectors);
        self.verify.begin(id, &bio);
        let effect = Effect::Issue { bio, sector: at };
        self.verify.effect(&effect);
        let Effect::Issue { bio, .. } = effect else {
            return;
        };
        self.verify.landed(&bio);
        self.end(&bio);
    }

    fn write(&mut self, id: ThinId, sector: u64, sectors: u64, at: u64) {
        self.request(Op::Write, id, sector, sectors, at);
    }

    fn read(&mut self, id: ThinId, sector: u64, sectors: u64, at: u64) {
        self.request(Op::Read, id, sector, sectors, at);
    }

    fn read_zeros(&mut self, id: ThinId, sector: u64, sectors: u64) {
        let bio = self.bio(Op::Read, sector, sectors);
        self.verify.begin(id, &bio);
        let mapped = Mapped::Zero(bio);
        self.verify.mapped(&mapped);
        let Mapped::Zero(bio) = mapped else { return };
        self.end(&bio);
    }

    fn discard(&mut self, id: ThinId, sector: u64, sectors: u64) {
        let bio = self.bio(Op::Discard, sector, sectors);
        self.verify.begin(id, &bio);
        self.end(&bio);
    }

    fn job(&mut self, effect: &Effect) {
        self.verify.effect(effect);
        self.verify.done(JobId::of_model());
    }

    fn zero(&mut self, sector: u64) {
        self.job(&Effect::Zero {
            job: JobId::of_model(),
            sector,
            sectors: SIZE,
        });
    }

    fn copy(&mut self, from: Source, from_sector: u64, sector: u64, sectors: u64) {
        self.job(&Effect::Copy {
            job: JobId::of_model(),
            from,
            from_sector,
            sector,
            sectors,
        });
    }

    fn snapshot(&mut self, id: ThinId, origin: ThinId) {
        let message = Message::CreateSnap { id, origin };
        self.verify.before_message(message, &metadata()).unwrap();
        self.verify.message(message);
    }

    fn is_right(&self) {
        assert_eq!(self.verify.found.first, [""; 0]);
        assert_eq!(self.verify.found.wrong, 0);
    }

    fn is_wrong(&self, words: &str) {
        assert_eq!(self.verify.found.wrong, 1, "{:?}", self.verify.found);
        let said = &self.verify.found.first[0];
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_new_block_that_was_not_zeroed_shows_what_somebody_left_there() {
    let mut rig = Rig::new();
    rig.zero(640);
    rig.write(ONE, 8, 8, 648);
    rig.read(ONE, 0, 128, 640);
    rig.is_right();
    rig.write(ONE, 256 + 8, 8, 1280 + 8);
    rig.read(ONE, 256 + 8, 8, 1280 + 8);
    rig.is_right();
    rig.read(ONE, 256, 128, 1280);
    rig.is_wrong("thin device 1, a read of sector 256: found what sector 1280 of the data device held before; expected what was never written (120 of 128");
}

#[test]
fn without_zeroing_only_what_was_written_is_known() {
    let mut rig = Rig::of(Verify::new(&metadata(), SIZE, true, 1).unwrap());
    rig.write(ONE, 8, 8, 648);
    rig.read(ONE, 0, 128, 640);
    rig.is_right();
    rig.read(ONE, 8, 8, 640);
    rig.is_wrong("sector 8");
}

#[test]
fn data_of_another_tenant_is_found_and_whose_it_is() {
    let mut rig = Rig::new();
    rig.write(ONE, 0, 128, 0);
    rig.write(TWO, 512, 128, 128);
    rig.read(ONE, 0, 128, 0);
    rig.is_right();
    rig.read(ONE, 0, 8, 128);
    rig.is_wrong("found data of write 129, which is sector 512 of thin device 2; expected data of write 1, which is sector 0 of thin device 1");
}

#[test]
fn a_write_in_the_block_of_another_tenant_is_found_by_either() {
    let mut rig = Rig::new();
    rig.write(ONE, 0, 128, 0);
    rig.write(TWO, 0, 128, 0);
    rig.read(TWO, 0, 128, 0);
    rig.is_right();
    rig.read(ONE, 0, 128, 0);
    rig.is_wrong("thin device 1");
}

#[test]
fn a_copy_of_the_wrong_block_or_to_the_wrong_place_in_it_is_found() {
    for (from, sectors, is_right) in [(0, 128, true), (128, 128, false), (8, 120, false)] {
        let mut rig = Rig::new();
        rig.write(ONE, 0, 128, 0);
        rig.write(ONE, 128, 128, 128);
        rig.snapshot(TWO, ONE);
        rig.copy(Source::Data, from, 256, sectors);
        rig.write(ONE, 0, 8, 256);
        rig.read(TWO, 0, 128, 0);
        rig.is_right();
        rig.read(ONE, 0, 128, 256);
        match is_right {
            true => rig.is_right(),
            false => rig.is_wrong("thin device 1, a read of sector 8"),
        }
    }
}

#[test]
fn a_copy_whose_source_is_written_meanwhile_is_found() {
    let mut rig = Rig::new();
    rig.write(ONE, 0, 128, 0);
    rig.snapshot(TWO, ONE);
    rig.verify.effect(&Effect::Copy {
        job: JobId::of_model(),
        from: Source::Data,
        from_sector: 0,
        sector: 256,
        sectors: SIZE,
    });
    rig.write(ONE, 16, 8, 16);
    rig.verify.done(JobId::of_model());
    rig.read(ONE, 0, 8, 256);
    rig.is_wrong("found a copy whose source changed meanwhile;");
}

#[test]
fn sharing_that_was_not_broken_shows_in_the_snapshot() {
    let mut rig = Rig::new();
    rig.write(ONE, 0, 128, 0);
    rig.snapshot(TWO, ONE);
    rig.write(ONE, 8, 8, 8);
    rig.read(ONE, 0, 128, 0);
    rig.is_right();
    rig.read(TWO, 0, 128, 0);
    rig.is_wrong("thin device 2, a read of sector 8");
}

#[test]
fn a_mapping_that_is_stale_is_found_by_a_read_and_by_the_sweep() {
    let mut metadata = metadata();
    let old = map(&mut metadata, ONE, 0);
    let mut rig = Rig::of(Verify::new(&metadata, SIZE, false, 1).unwrap());
    rig.read(ONE, 0, 128, old);
    rig.verify.sweep(&metadata).unwrap();
    rig.is_right();
    assert_eq!(rig.verify.found.blocks, 1);
    rig.write(ONE, 0, 128, 50 * SIZE);
    rig.verify.sweep(&metadata).unwrap();
    rig.is_wrong("thin device 1, as a whole: sector 0: found what sector 0 of the data device held before; expected data of write 1");
    rig.read(ONE, 0, 8, old);
    assert_eq!(rig.verify.found.wrong, 2);
}

#[test]
fn a_device_is_looked_at_before_it_is_deleted() {
    let mut metadata = metadata();
    map(&mut metadata, ONE, 0);
    let mut rig = Rig::of(Verify::new(&metadata, SIZE, false, 1).unwrap());
    rig.write(ONE, 0, 8, 640);
    let delete = Message::Delete(ONE);
    rig.verify.before_message(delete, &metadata).unwrap();
    rig.is_wrong("thin device 1, as a whole: sector 0");
    // A message that the pool will refuse.
    let delete = Message::Delete(TWO);
    rig.verify.before_message(delete, &metadata).unwrap();
}

#[test]
fn a_block_that_lost_its_mapping_is_found_by_the_sweep() {
    let metadata = metadata();
    let mut rig = Rig::new();
    rig.write(ONE, 128, 8, 0);
    rig.verify.sweep(&metadata).unwrap();
    rig.is_wrong("as a whole: sector 128: found nothing mapped;");
    let mut rig = Rig::new();
    rig.write(ONE, 128, 8, 0);
    rig.discard(ONE, 128, 128);
    rig.verify.sweep(&metadata).unwrap();
    rig.is_right();
}

#[test]
fn a_block_that_somebody_else_maps_too_is_found_by_the_sweep() {
    let mut metadata = metadata();
    let at = map(&mut metadata, ONE, 0);
    let mut rig = Rig::of(Verify::new(&metadata, SIZE, false, 1).unwrap());
    metadata
        .insert_block(ONE, ThinBlock(7), DataBlock(at / SIZE))
        .unwrap();
    rig.verify.sweep(&metadata).unwrap();
    rig.is_wrong("as a whole: sector 896");
}

#[test]
fn a_write_that_never_came_to_the_data_device_is_found() {
    let mut rig = Rig::new();
    rig.zero(0);
    let bio = rig.bio(Op::Write, 0, 8);
    rig.verify.begin(ONE, &bio);
    rig.end(&bio);
    rig.read(ONE, 0, 128, 0);
    rig.is_wrong("a read of sector 0: found zeros;");
}

#[test]
fn a_read_that_ended_and_read_nothing_is_found() {
    let mut rig = Rig::new();
    let bio = rig.bio(Op::Read, 0, 8);
    rig.verify.begin(ONE, &bio);
    rig.end(&bio);
    rig.is_wrong("had read nothing");
}

#[test]
fn a_discard_is_a_hint_for_whole_blocks_and_none_for_parts() {
    let mut rig = Rig::new();
    rig.write(ONE, 0, 128, 0);
    rig.write(ONE, 128, 128, 128);
    rig.discard(ONE, 64, 192);
    rig.read(ONE, 0, 128, 0);
    rig.read(ONE, 128, 128, 128);
    rig.read_zeros(ONE, 128, 128);
    rig.is_right();
    rig.read_zeros(ONE, 64, 64);
    rig.is_wrong("a read of sector 64: found zeros; expected data of write 65");
}

#[test]
fn data_that_was_discarded_does_not_come_back_in_a_new_block() {
    let mut rig = Rig::new();
    rig.write(ONE, 0, 128, 0);
    rig.discard(ONE, 0, 128);
    rig.job(&Effect::Discard {
        job: JobId::of_model(),
        sector: 0,
        sectors: SIZE,
    });
    // Another block, and not zeroed.
    rig.write(TWO, 0, 8, 0);
    rig.read(TWO, 0, 128, 0);
    rig.is_wrong("found what a discard of the data device left;");
}

#[test]
fn an_external_origin_shows_below_its_end_and_in_what_is_copied_of_it() {
    let mut rig = Rig::new();
    rig.verify.opened(ONE, Some(200));
    let mut bio = rig.bio(Op::Read, 128, 128);
    let mut read_origin = |rig: &mut Rig, sectors| {
        bio.id += 100;
        rig.verify.begin(ONE, &bio);
        let inner = std::mem::replace(&mut bio, Box::new(Bio::flush(0)));
        let effect = Effect::ReadOrigin {
            bio: inner,
            sectors,
        };
        rig.verify.effect(&effect);
        if let Effect::ReadOrigin { bio: inner, .. } = effect {
            rig.verify.landed(&inner);
            rig.end(&inner);
            bio = inner;
        }
    };
    read_origin(&mut rig, 72);
    rig.copy(Source::Origin(0), 0, 640, 128);
    rig.write(ONE, 8, 8, 648);
    rig.read(ONE, 0, 128, 640);
    rig.is_right();
    read_origin(&mut rig, 64);
    rig.is_wrong("sector 192: found zeros;");
    let mut rig = Rig::new();
    rig.verify.opened(ONE, Some(200));
    rig.copy(Source::Origin(0), 8, 640, 128);
    rig.write(ONE, 8, 8, 648);
    rig.read(ONE, 0, 128, 640);
    rig.is_wrong("sector 0: found sector 8 of the external origin;");
}

#[test]
fn an_id_that_is_used_again_has_nothing_of_the_device_before() {
    let mut rig = Rig::new();
    rig.write(ONE, 0, 128, 0);
    rig.verify.message(Message::Delete(ONE));
    rig.verify.message(Message::CreateThin(ONE));
    rig.read_zeros(ONE, 0, 128);
    rig.is_right();
    rig.read(ONE, 0, 128, 0);
    rig.is_wrong("found data of write 1, which nobody has by now;");
}

#[test]
fn a_sample_looks_at_the_same_blocks_of_all_devices_and_finds_faults_there() {
    let mut rig = Rig::of(Verify::new(&metadata(), SIZE, false, 8).unwrap());
    let sampled = (0..800).filter(|&block| rig.verify.is_sampled(block));
    let sampled: Vec<u64> = sampled.collect();
    assert!((50..150).contains(&sampled.len()), "{}", sampled.len());
    for block in 0..800 {
        rig.zero(block * SIZE);
        rig.write(ONE, block * SIZE, 8, block * SIZE);
    }
    assert!(rig.verify.disk.len() <= sampled.len());
    for block in 0..800 {
        rig.read(ONE, block * SIZE, 128, block * SIZE);
    }
    rig.is_right();
    assert_eq!(rig.verify.found.reads, sampled.len() as u64);
    rig.read(ONE, sampled[3] * SIZE, 8, sampled[4] * SIZE);
    rig.is_wrong("thin device 1");
}
