//! The command of `--run`: started, waited for, and ended together with what it has started.
//!
//! Where there is no terminal the command has a process group of its own, so that a signal reaches what it has left behind, too. On a
//! terminal it stays in the group of the server: in any other the terminal would stop it as soon as it reads, and `bash` would be of no
//! use. There signals go to its descendants.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, getpgid, kill_process, kill_process_group, test_kill_process,
    test_kill_process_group,
};
use signal_hook::consts::SIGINT;

use super::run::End;
use crate::exit::Exit;

/// What ends a command, and for how long it is waited then. Interactive shells take no notice of the first, but do of the second.
const SIGNALS: [(Signal, Duration); 3] = [
    (Signal::TERM, PATIENCE),
    (Signal::HUP, PATIENCE),
    (Signal::KILL, PATIENCE),
];
const PATIENCE: Duration = Duration::from_secs(3);
/// How often it is looked.
const PERIOD: Duration = Duration::from_millis(20);

/// A command that runs.
pub(super) struct Running {
    leader: Pid,
    /// The leader has a process group of its own.
    has_group: bool,
}

impl Running {
    /// Starts the command; `end` is told its status when it ends.
    pub(super) fn start(mut command: Command, end: Sender<End>) -> anyhow::Result<Self> {
        let has_group = File::open("/dev/tty").is_err();
        if has_group {
            command.process_group(0);
        }
        let child = command.spawn();
        let child = child.context("cannot start the command of --run")?;
        let leader = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let leader = leader.context("the command of --run has no process id")?;
        let waits = move || wait(child, &end);
        std::thread::Builder::new()
            .name("run".into())
            .spawn(waits)?;
        Ok(Self { leader, has_group })
    }

    /// Ends it, and what it has started, after the server got `signal`; in the end by force.
    pub(super) fn stop(&self, signal: i32) {
        let mut members = vec![self.leader];
        add_descendants(&mut members);
        // A terminal has sent it to all of them already, and some take the second as an order to end at once.
        if !self.has_group && signal == SIGINT && self.ends_within(PATIENCE, &mut members) {
            return;
        }
        for (signal, patience) in SIGNALS {
            add_descendants(&mut members);
            self.send(signal, &members);
            if self.ends_within(patience, &mut members) {
                return;
            }
        }
    }

    /// Who ended meanwhile takes no signal, and needs none.
    fn send(&self, signal: Signal, members: &[Pid]) {
        let is_elsewhere = |pid: &&Pid| getpgid(Some(**pid)) != Ok(self.leader);
        for signal in [signal, Signal::CONT] {
            if self.has_group {
                kill_process_group(self.leader, signal).ok();
            }
            for &pid in members
                .iter()
                .filter(|pid| !self.has_group || is_elsewhere(pid))
            {
                kill_process(pid, signal).ok();
            }
        }
    }

    fn ends_within(&self, patience: Duration, members: &mut Vec<Pid>) -> bool {
        let end = Instant::now() + patience;
        loop {
            members.retain(|&pid| test_kill_process(pid) != Err(Errno::SRCH));
            let is_empty = !self.has_group || test_kill_process_group(self.leader).is_err();
            if members.is_empty() && is_empty {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(PERIOD);
        }
    }
}

/// Adds the processes that those of `members` have started, theirs, and so on.
fn add_descendants(members: &mut Vec<Pid>) {
    let mut at = 0;
    while let Some(&pid) = members.get(at) {
        at += 1;
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let ids = children.split_whitespace().filter_map(|id| id.parse().ok());
            for child in ids.filter_map(Pid::from_raw) {
                if !members.contains(&child) {
                    members.push(child);
                }
            }
        }
    }
}

fn wait(mut child: Child, end: &Sender<End>) {
    let code = child.wait().map_or(Exit::Failure.code(), |status| {
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        // As shells tell it.
        let signal = status.signal().unwrap_or(0);
        code.unwrap_or_else(|| 128_u8.saturating_add(signal.try_into().unwrap_or(0)))
    });
    // Nobody may be left to hear it.
    let _ = end.send(End::Command(code));
}
