//! `thin_serve --run`: the command, and what becomes of it and of what it has started when the server is told to end.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::serve::Scene;
use crate::support::{BINARY, program};

const PATIENCE: Duration = Duration::from_secs(60);

/// True once `is_so`; it is waited for that for a while.
fn becomes(mut is_so: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if is_so() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// A process that runs; one that nobody has heard of the end of does not.
fn runs(id: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z')
}

/// Serves with this command, in which `$told` is a file, until it has written `lines` lines there; then the server is told to end. What
/// the file has in the end.
fn stopped_after(scene: &mut Scene, command: &str, lines: usize) -> String {
    let told = scene.path("told");
    let mut server = Command::new(BINARY);
    server.args(scene.arguments(&["--run", command]));
    let server = server.env("told", &told).stdin(Stdio::null()).spawn();
    let id = server.as_ref().expect("started").id().to_string();
    scene.server = server.ok();
    let has_told = || fs::read_to_string(&told).is_ok_and(|text| text.lines().count() >= lines);
    assert!(becomes(has_told), "the command does not run");
    program("kill", [id]).run().expect(0);
    let server = scene.server.as_mut().expect("it is served");
    let mut status = None;
    assert!(becomes(|| {
        status = server.try_wait().expect("waiting works");
        status.is_some()
    }));
    assert_eq!(status.and_then(|status| status.code()), Some(0));
    scene.assert_sound();
    fs::read_to_string(Path::new(&told)).expect("read")
}

#[test]
fn what_the_command_has_started_ends_with_the_server() {
    let mut scene = Scene::of_kernel();
    // One in the background, one that nobody is the parent of any more, one that is waited for.
    let command = "sleep 600 & echo $! >>\"$told\"; (sleep 600 & echo $! >>\"$told\"); \
                   sh -c 'echo $$ >>\"$told\"; exec sleep 600'; echo went on >>\"$told\"";
    let told = stopped_after(&mut scene, command, 3);
    assert!(!told.contains("went on"), "{told}");
    let ids: Vec<&str> = told.lines().collect();
    assert_eq!(ids.len(), 3);
    // Without a group of its own, on a terminal, the one without a parent is nobody's.
    let is_on_terminal = fs::File::open("/dev/tty").is_ok();
    for (at, id) in ids.iter().enumerate() {
        if at == 1 && is_on_terminal {
            program("kill", [id]).run();
        }
        assert!(becomes(|| !runs(id)), "{id} goes on");
    }
}

/// What it has to undo it undoes while the pool is still served.
#[test]
fn a_command_that_heeds_signals_ends_in_its_own_way() {
    let mut scene = Scene::of_kernel();
    let command =
        "trap : TERM HUP; echo begun >>\"$told\"; sleep 600; nbdinfo --size \"$uri\" >>\"$told\"";
    let told = stopped_after(&mut scene, command, 1);
    assert_eq!(
        told,
        "begun\n58982400\n".replace("58982400", &(900 * 65536).to_string())
    );
}

#[test]
fn a_command_that_heeds_nothing_is_killed() {
    let mut scene = Scene::of_kernel();
    let command = "trap '' TERM HUP; echo $$ >>\"$told\"; while :; do sleep 1; done";
    let told = stopped_after(&mut scene, command, 1);
    assert!(becomes(|| !runs(told.trim())), "{told} goes on");
}

/// A shell that people type into has the terminal, and reads from it.
#[test]
fn a_shell_on_a_terminal_can_be_typed_into() {
    let scene = Scene::of_kernel();
    let mut words = vec![format!("'{BINARY}'")];
    for argument in scene.arguments(&["--run", "bash --norc -i"]) {
        words.push(format!("'{}'", argument.to_str().expect("text")));
    }
    let call = program("script", ["--quiet", "--return", "--command"]);
    let shell = call.arg(words.join(" ")).arg("/dev/null");
    let ended = shell
        .stdin("set -m\necho $((40+2)) is told; ls -d /\nexit 5\n")
        .run();
    assert_eq!(ended.code, Some(5), "{}{}", ended.out(), ended.stderr);
    let out = ended.out();
    assert!(
        out.contains("42 is told") && !out.contains("job control"),
        "{out}"
    );
}
