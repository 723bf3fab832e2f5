//! Parts of traces.

use std::time::Duration;

use thintools::replay::{Batch, TraceOp, Window, open};

use super::recorded;

/// How many requests of the oracle there are in a window, when the first and the last of them are, and which control events.
fn part(window: Window) -> (u64, u64, Option<(u64, u64)>, Vec<String>) {
    let (_, reader) = open(&[recorded("oracle/thin")], None, false).expect("it is there");
    let mut reader = window.of(reader);
    let (mut ios, mut controls, mut batch) = (Vec::new(), Vec::new(), Batch::default());
    while reader.read(&mut batch).expect("sound") {
        ios.append(&mut batch.ios);
        controls.extend(batch.controls.drain(..).map(|control| control.text));
    }
    assert!(!reader.read(&mut batch).expect("sound"), "an end stays one");
    assert!(batch.ios.is_empty() && batch.controls.is_empty());
    let notes = reader.notes();
    assert_eq!(notes.events, ios.len() as u64);
    let span = ios.first().zip(ios.last());
    (
        notes.events,
        notes.left_out,
        span.map(|(first, last)| (first.time_ns, last.time_ns)),
        controls,
    )
}

#[test]
fn time_begins_at_the_start_of_a_window_and_controls_before_it_are_kept() {
    let whole = part(Window::default());
    assert_eq!((whole.0, whole.1, whole.3.len()), (6677, 0, 7));
    let (start, end) = (Duration::from_secs(10), Duration::from_secs(15));
    let second = part(Window {
        start,
        ..Window::default()
    });
    assert_eq!(second.3, whole.3);
    assert_eq!(second.0 + second.1, 6677);
    let first = part(Window {
        end: Some(start),
        ..Window::default()
    });
    assert_eq!(first.0 + second.0, 6677);
    let middle = part(Window {
        start,
        end: Some(end),
        ..Window::default()
    });
    assert!(middle.0 > 0 && middle.0 < second.0, "{middle:?}");
    let (from, to) = middle.2.expect("some");
    assert!(from <= to && to < 5_000_000_000);
    assert!(middle.3.len() < 7);
}

#[test]
fn a_window_ends_with_its_limit_and_leaves_operations_out() {
    for limit in [0, 1, 4095, 4096, 4097, 6677, 10_000] {
        let part = part(Window {
            limit: Some(limit),
            ..Window::default()
        });
        assert_eq!(part.0, limit.min(6677));
        assert_eq!(part.3.len() == 7, limit > 6677, "{limit}");
    }
    let flushes = part(Window {
        without: TraceOp::ALL
            .into_iter()
            .filter(|op| *op != TraceOp::Flush)
            .collect(),
        ..Window::default()
    });
    assert_eq!((flushes.0, flushes.1, flushes.3.len()), (35, 6642, 7));
    for op in TraceOp::ALL {
        assert_eq!(op.to_string().parse::<TraceOp>().expect("a name"), op);
    }
    assert!("trim".parse::<TraceOp>().is_err());
}
