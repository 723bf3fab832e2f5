//! Two exports of a running server under random requests of several clients, while snapshots are taken, written and deleted: every
//! sector has what was written to it last, and every snapshot what its origin had. `tests/serve-soak.sh` does it for longer.

use std::collections::BTreeSet;
use std::env;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::load::{Load, assert_snapshots};
use super::{BLOCK, Scene};

/// Blocks of a device, of which there are two; snapshots may leave too few for all of them.
const THIN_BLOCKS: usize = 40;
const DATA_BLOCKS: u64 = 128;
/// Of a run that nobody asked to last longer.
const ROUNDS: u64 = 8;

fn setting(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().expect("a number"))
}

fn control(scene: &Scene, words: &str) -> bool {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let done = scene.ctl(&words.split(' ').collect::<Vec<_>>());
        // A client that has hung up takes a moment to go.
        match done.code {
            Some(0) => return true,
            _ if words.starts_with("deactivate") && Instant::now() < end => {}
            _ => {
                eprintln!("{words}: {}", done.stderr);
                return false;
            }
        }
    }
}

/// One load, and then the server is stopped or killed. What the devices hold after that comes back.
fn round(scene: &mut Scene, first: &[Vec<u8>], seed: u64) -> Vec<Vec<u8>> {
    let len = THIN_BLOCKS * BLOCK;
    let sizes = [0, 1].map(|id| format!("{id}:{len}"));
    let arguments = [
        "--create", "--quiet", "--thin", &sizes[0], "--thin", &sizes[1],
    ];
    scene.serve(&arguments);
    let time = AtomicU64::new(0);
    let load = Load {
        socket: &scene.path("nbd"),
        clock: &|| time.fetch_add(1, Ordering::SeqCst) + 1,
        control: &|words| control(scene, words),
        requests: 1500,
        snapshots: 25,
        first_snapshot: 2,
    };
    let mut histories = load.run(first, seed);
    let now = time.load(Ordering::SeqCst) + 1;
    let case = format!("SERVE_SOAK_SEED={seed}");
    assert_snapshots(&histories, &case);
    histories.retain(|_, history| history.may_and_must_exist(now).1);
    let contents = |scene: &Scene| -> Vec<Vec<u8>> {
        let read = |id: &u64| scene.connect(&id.to_string()).read(0, len).expect("read");
        histories.keys().map(read).collect()
    };
    let found = contents(scene);
    for ((id, history), found) in histories.iter().zip(&found) {
        history.assert_current(found, &format!("{case}, thin device {id}"));
    }
    let is_killed = seed.is_multiple_of(2);
    match is_killed {
        true => scene.kill(),
        false => scene.stop(),
    }
    scene.assert_sound();
    scene.serve(&arguments);
    let there: BTreeSet<u64> = serde_json::from_str(&scene.asked(&["exported"])).expect("JSON");
    for id in histories.keys().filter(|id| !there.contains(id)) {
        assert!(
            control(scene, &format!("activate {id} {len}")),
            "{case}, thin device {id}"
        );
    }
    let mut found = contents(scene);
    for ((id, history), found) in histories.iter().zip(&found) {
        let case = format!("{case}, thin device {id}, started anew");
        match is_killed {
            true => history.assert_survived(found, now, &case),
            false => history.assert_current(found, &case),
        }
    }
    for id in histories.keys().filter(|id| **id > 1) {
        let is_gone = control(scene, &format!("deactivate {id}"));
        assert!(
            is_gone && control(scene, &format!("delete {id}")),
            "{case}, thin device {id}"
        );
    }
    scene.stop();
    found.truncate(2);
    found
}

/// `SERVE_SOAK_SEED` has it begin with another seed, `SERVE_SOAK_MINUTES` has it last longer.
#[test]
fn every_sector_has_what_was_written_last_whatever_snapshots_come_and_go() {
    let minutes = setting("SERVE_SOAK_MINUTES").unwrap_or(0);
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    let first = setting("SERVE_SOAK_SEED").unwrap_or(1);
    let mut scene = Scene::new(DATA_BLOCKS, 1 << 20);
    let mut contents = vec![vec![0; THIN_BLOCKS * BLOCK]; 2];
    for n in 0.. {
        if n >= ROUNDS && Instant::now() >= end {
            break;
        }
        contents = round(&mut scene, &contents, first + n);
    }
}
