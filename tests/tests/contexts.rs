//! What NBD clients are told of a thin device's mappings: clients that people have ask, the metadata's own truth is known.

use crate::serve::{BLOCK, Scene};
use crate::support::program;
use serde_json::Value;
use std::collections::BTreeMap;

const BLOCKS: u64 = 64;

/// The status of each block by `nbdinfo`, which numbers contexts as the server does.
fn map(scene: &Scene, export: &str, context: &str) -> Vec<u64> {
    let uri = format!(
        "nbd+unix:///{export}?socket={}",
        scene.path("nbd").display()
    );
    let asked = [format!("--map={context}"), "--json".into(), uri];
    let text = program("nbdinfo", asked).run().expect(0).out();
    let extents: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let number = |extent: &Value, field: &str| extent[field].as_u64().expect("a number");
    let mut statuses = Vec::new();
    for extent in &extents {
        let blocks = number(extent, "length") / BLOCK as u64;
        statuses.extend((0..blocks).map(|_| number(extent, "type")));
    }
    assert_eq!(statuses.len() as u64, BLOCKS, "{text}");
    statuses
}

/// Blocks with the statuses that they are said to have; all others have `rest`.
fn statuses(rest: u64, of: &[(&[u64], u64)]) -> Vec<u64> {
    let mut all = vec![rest; BLOCKS as usize];
    for (blocks, status) in of {
        blocks
            .iter()
            .for_each(|&block| all[block as usize] = *status);
    }
    all
}

/// Thin device 0 and its snapshot 1, after which two blocks were written and one was discarded.
fn scene() -> Scene {
    let mut scene = Scene::new(128, 1 << 20);
    scene.serve(&["--create", "--thin", "0:4m"]);
    let io = |commands: &[&str]| {
        let uri = format!("nbd+unix:///0?socket={}", scene.path("nbd").display());
        let mut all = vec!["-f", "raw"];
        all.extend(commands.iter().flat_map(|command| ["-c", command]));
        let done = program("qemu-io", all.into_iter().chain([&*uri]))
            .run()
            .expect(0);
        assert!(!done.out().contains("failed"), "{}", done.out());
    };
    io(&["write -P 1 0 512k", "write -P 2 1280k 256k", "flush"]);
    scene.asked(&["message", "create_snap 1 0"]);
    scene.asked(&["activate", "1", "4194304"]);
    io(&[
        "write -P 3 128k 64k",
        "write -P 4 1920k 64k",
        "discard 1344k 64k",
        "flush",
    ]);
    scene
}

const NEW: &[u64] = &[2, 30];
const OLD: &[u64] = &[0, 1, 3, 4, 5, 6, 7, 20, 22, 23];
const GONE: &[u64] = &[21];

#[test]
fn libnbd_is_told_of_mappings_as_they_are() {
    let mut scene = scene();
    for (context, expected) in [
        ("base:allocation", statuses(3, &[(NEW, 0), (OLD, 0)])),
        ("qemu:allocation-depth", statuses(0, &[(NEW, 1), (OLD, 2)])),
        (
            "qemu:dirty-bitmap:since-1",
            statuses(0, &[(NEW, 1), (GONE, 1)]),
        ),
        ("dm-thin:shared", statuses(0, &[(OLD, 1)])),
        (
            "dm-thin:time",
            statuses(u64::from(u32::MAX), &[(NEW, 1), (OLD, 0)]),
        ),
    ] {
        assert_eq!(map(&scene, "0", context), expected, "{context}");
    }
    // The snapshot's own view: what was discarded is there, and nobody else's.
    let of_snapshot = statuses(0, &[(OLD, 2), (GONE, 1), (&[2], 1)]);
    assert_eq!(map(&scene, "1", "qemu:allocation-depth"), of_snapshot);
    scene.stop();
}

#[test]
fn qemu_img_copies_what_changed_since_a_snapshot() {
    let mut scene = scene();
    let options = |export: &str, context: &str| {
        let socket = scene.path("nbd").display().to_string();
        let of = format!("driver=nbd,export={export},server.type=unix,server.path={socket}");
        format!("{of},x-dirty-bitmap={context}")
    };
    let dirty = options("0", "qemu:dirty-bitmap:since-1");
    let map = ["map", "--output=json", "--image-opts", &dirty];
    let text = program("qemu-img", map).run().expect(0).out();
    let extents: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    // As it shows them, what is dirty is no data.
    let dirty: BTreeMap<u64, u64> = (extents.iter())
        .filter(|extent| extent["data"] == false)
        .map(|extent| ["start", "length"].map(|field| extent[field].as_u64().expect("a number")))
        .map(|[start, length]| (start >> 16, length >> 16))
        .collect();
    assert_eq!(dirty, BTreeMap::from([(2, 1), (21, 1), (30, 1)]), "{text}");
    // A backup of the snapshot, and what is dirty on top of it, is the device.
    let read = |scene: &Scene, export: &str| {
        let size = BLOCKS as u32 * BLOCK as u32;
        scene.connect(export).ask(0, 0, 0, size, &[]).expect("read")
    };
    let (mut backup, now) = (read(&scene, "1"), read(&scene, "0"));
    assert_ne!(backup, now);
    for (block, blocks) in dirty {
        let range = block as usize * BLOCK..(block + blocks) as usize * BLOCK;
        backup[range.clone()].copy_from_slice(&now[range]);
    }
    assert!(backup == now, "the backup is not the device");
    scene.stop();
}

/// The page that says what of the protocol there is, and the manual page, name the contexts that a client is told of.
#[test]
fn the_contexts_are_those_of_the_documentation() {
    let mut scene = scene();
    let uri = format!("nbd+unix:///0?socket={}", scene.path("nbd").display());
    let text = program("nbdinfo", ["--json", &uri]).run().expect(0).out();
    let told: Value = serde_json::from_str(&text).expect("JSON");
    let told = told["exports"][0]["contexts"].as_array().expect("contexts");
    let told: Vec<String> = (told.iter())
        .map(|name| {
            name.as_str()
                .expect("a name")
                .replace("since-1", "since-ID")
        })
        .collect();
    let page = include_str!("../../src/lib/runtime/NBD.md");
    let (_, table) = page.split_once("# Contexts").expect("a section");
    let (table, _) = table.split_once("\n# ").expect("another one");
    let documented: Vec<&str> = (table.lines())
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    assert_eq!(
        sorted(told.clone()),
        sorted(documented.iter().map(ToString::to_string).collect())
    );
    let manual = include_str!("../../man/thin_serve.8").replace('\\', "");
    for name in told {
        assert!(manual.contains(&name), "{name}");
    }
    scene.stop();
}
