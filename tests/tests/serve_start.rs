//! How `thin_serve` begins: what it makes, what it refuses, and how it tells that it is ready.

use std::fs::{self, File};

use crate::serve::{BLOCK, Scene};

/// What cannot be served leaves no file behind, and what was there as it was.
#[test]
fn a_pool_that_cannot_be_made_leaves_nothing() {
    let scene = Scene::new(1, 1 << 20);
    let (meta, data) = (scene.path("meta"), scene.path("data"));
    let huge = |size: &str| {
        let more = ["--create", "--data-size", size, "--thin", "0:1m"];
        scene.run(&[&more[..], &["--run", "true"]].concat())
    };
    for file in [&meta, &data] {
        fs::remove_file(file).expect("removed");
    }
    // More blocks than mappings can name.
    huge("100000t").expect(1).expect_stderr(&["1099511627776"]);
    assert!(!meta.exists() && !data.exists());
    // Nowhere to serve.
    let nowhere = scene.run(&["--create", "--data-size", "1m"]).expect(1);
    nowhere.expect_stderr(&["nowhere to serve"]);
    assert!(!meta.exists() && !data.exists());
    // Files that were there: neither may be flagged for a check.
    File::create(&meta)
        .expect("made")
        .set_len(1 << 20)
        .expect("long");
    huge("100000t").expect(1);
    assert!(!data.exists());
    // More blocks than the metadata has room to count.
    huge("1t").expect(1);
    assert!(!data.exists());
    assert!(
        fs::read(&meta).expect("read")[..4096]
            .iter()
            .all(|&b| b == 0)
    );
    huge("1m").expect(0);
    scene.assert_sound();
}

/// A pool that exists has its blocks for good; a file that exists keeps its size, and that is told.
#[test]
fn what_exists_is_not_made_in_another_way() {
    let scene = Scene::new(1, 1 << 20);
    fs::remove_file(scene.path("data")).expect("removed");
    let create = |more: &[&str]| {
        scene.run(&[&["--create", "--thin", "0:1m", "--run", "true"], more].concat())
    };
    let silent = create(&["--data-size", "1m"]).expect(0);
    assert_eq!(silent.stderr, "");
    let told = create(&["--data-size", "2m"]).expect(0);
    told.expect_stderr(&["stays 1048576 bytes", "--data-size"]);
    assert_eq!(
        fs::metadata(scene.path("data")).expect("there").len(),
        16 * BLOCK as u64
    );
    create(&["--block-size", "64k"]).expect(0);
    let refused = create(&["--block-size", "128k"]).expect(1);
    refused.expect_stderr(&["65536 bytes for good", "131072"]);
    scene.assert_sound();
}
