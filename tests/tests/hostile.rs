//! Clients of `thin_serve` that mean it no good, beside one that goes on being served, and what memory that takes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::serve::client::{Client, READ};
use crate::serve::{BLOCK, Scene};

/// What NBD.md says that the clients of a server take.
const BOUND: u64 = 256 << 20;
/// Clients that can have opened an export.
const MOST_CLIENTS: usize = 256;
const MIB: usize = 1 << 20;

/// A pool with a device of 64 MiB, the first 32 of which have data.
struct Attack {
    scene: Scene,
    good: Client,
    data: Vec<u8>,
    /// Peak of the server's memory in bytes before anybody attacked.
    before: u64,
}

impl Attack {
    fn new() -> Self {
        let mut scene = Scene::new(1024, 1 << 20);
        scene.serve(&["--create", "--thin", "0:64m"]);
        let data: Vec<u8> = (0..32 * MIB).map(|i| (i / 7 % 251) as u8).collect();
        let mut good = scene.connect("0");
        for (at, part) in (0..).step_by(MIB).zip(data.chunks(MIB)) {
            good.write(at, part).expect("written");
        }
        good.flush().expect("flushed");
        let before = scene.peak_memory();
        Self {
            scene,
            good,
            data,
            before,
        }
    }

    /// A client that has opened the export, and says no more for now.
    fn attacker(&self) -> Client {
        self.scene.connect("0")
    }

    /// The client that was there before is served as if nobody else were there.
    fn assert_served(&mut self) {
        for round in 0..20 {
            let at = (48 + round) * BLOCK + round;
            self.good
                .write(at as u64, &[round as u8; 5000])
                .expect("written");
            self.good.flush().expect("flushed");
            let found = self.good.read(at as u64, 5000).expect("read");
            self.data[at..at + 5000].fill(round as u8);
            assert!(found == self.data[at..at + 5000], "round {round}");
        }
        // More than a connection has memory of its own.
        let found = self.good.read(0, self.data.len()).expect("read");
        assert!(found == self.data, "other data");
        self.good.write(0, &found).expect("written");
        let stranger = UnixStream::connect(self.scene.path("nbd"));
        drop(stranger.expect("it still listens"));
    }

    fn end(mut self) {
        self.assert_served();
        let grown = self.scene.peak_memory() - self.before;
        println!("clients took {} KiB", grown >> 10);
        assert!(grown < BOUND, "clients took {grown} bytes");
        drop(self.good);
        self.scene.stop();
    }
}

/// The head of a request for the bytes from `offset`.
fn head(command: u16, offset: u64, len: usize) -> Vec<u8> {
    let mut head = 0x2560_9513_u32.to_be_bytes().to_vec();
    head.extend([0, 0]);
    head.extend(command.to_be_bytes());
    head.extend(7_u64.to_be_bytes());
    head.extend(offset.to_be_bytes());
    head.extend((len as u32).to_be_bytes());
    head
}

#[test]
fn clients_that_do_not_finish_the_handshake_leave_places_to_others() {
    let mut attack = Attack::new();
    let said = b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\xff\xffand no more";
    let mut half_open = Vec::new();
    for n in 0..600 {
        let mut stream = UnixStream::connect(attack.scene.path("nbd")).expect("connected");
        // Whoever had to go does not hear it.
        let _ = stream.write_all(&said[..n % said.len()]);
        half_open.push(stream);
        if n % 100 == 0 {
            attack.scene.connect("0").flush().expect("flushed");
        }
    }
    attack.assert_served();
    // The oldest had to go, long before their time was over.
    let mut rest = Vec::new();
    half_open[0].read_to_end(&mut rest).expect("hung up");
    assert_eq!(rest.len(), 18);
    attack.end();
}

#[test]
fn idle_clients_take_next_to_no_memory_and_leave_when_they_like() {
    let attack = Attack::new();
    let mut idle: Vec<Client> = (1..MOST_CLIENTS).map(|_| attack.attacker()).collect();
    for client in &mut idle {
        client.read(0, 100_000).expect("read");
    }
    let refused = Client::connect(&attack.scene.path("nbd"), "0");
    assert!(refused.is_err(), "there is no place");
    let uri = format!(
        "nbd+unix:///0?socket={}",
        attack.scene.path("nbd").display()
    );
    let told = crate::support::program("nbdinfo", [uri]).run().expect(1);
    told.expect_stderr(&["server replied with error"]);
    let grown = attack.scene.peak_memory() - attack.before;
    assert!(grown < 64 << 20, "{grown} bytes");
    drop(idle.pop());
    let has_place = |_| Client::connect(&attack.scene.path("nbd"), "0").is_ok();
    assert!((0..100_000).any(has_place), "the place is lost");
    attack.end();
}

#[test]
fn clients_that_take_no_replies_hold_their_share_and_no_more() {
    let mut attack = Attack::new();
    let mut greedy: Vec<Client> = (0..MOST_CLIENTS - 8).map(|_| attack.attacker()).collect();
    for (n, client) in greedy.iter_mut().enumerate() {
        let len = if n % 2 == 0 { 32 * MIB } else { 4096 };
        let request = head(READ, 0, len);
        client.send(&request.repeat(if n % 2 == 0 { 4 } else { 2000 }));
        if n % 50 == 0 {
            attack.assert_served();
        }
    }
    attack.end();
}

#[test]
fn clients_that_send_half_of_their_data_hold_their_share_and_no_more() {
    let mut attack = Attack::new();
    let mut slow: Vec<Client> = (0..MOST_CLIENTS - 8).map(|_| attack.attacker()).collect();
    for (n, client) in slow.iter_mut().enumerate() {
        // Where the good one does not write.
        client.send(&head(1, 32 << 20, 32 * MIB));
        client.send(&vec![1; 150_000]);
        if n % 50 == 0 {
            attack.assert_served();
        }
    }
    attack.end();
}

#[test]
fn a_storm_of_small_requests_without_a_look_at_the_replies_is_held_up() {
    let mut attack = Attack::new();
    let mut chatty: Vec<Client> = (0..MOST_CLIENTS - 8).map(|_| attack.attacker()).collect();
    for (n, client) in chatty.iter_mut().enumerate() {
        client.send_what_is_taken(&head(if n % 2 == 0 { 3 } else { READ }, 0, n % 2));
        if n % 50 == 0 {
            attack.assert_served();
        }
    }
    attack.end();
}

/// A device of two exbibytes with a few blocks here and there. Whatever is asked of all of it takes no longer than the blocks do.
#[test]
fn requests_for_exbibytes_end_soon() {
    let mut scene = Scene::new(64, 1 << 20);
    scene.serve(&["--create", "--thin", "0:2097152t"]);
    let size = 1_u64 << 61;
    let mut client = scene.connect("0");
    for at in [0, 1 << 40, 1 << 60, size - BLOCK as u64] {
        client.write(at, &[1; BLOCK]).expect("written");
    }
    let mut stream = UnixStream::connect(scene.path("nbd")).expect("connected");
    let options = b"\0\0\0\x03IHAVEOPT\0\0\0\x0b\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\x010";
    stream.write_all(options).expect("sent");
    stream.read_exact(&mut [0; 18 + 20 + 10]).expect("agreed");
    let mut ask = |command: u16, flags: u16| {
        let mut head = 0x21e4_1c71_u32.to_be_bytes().to_vec();
        head.extend(flags.to_be_bytes());
        head.extend(command.to_be_bytes());
        head.extend([0; 16]);
        head.extend(size.to_be_bytes());
        stream.write_all(&head).expect("sent");
        let mut chunk = [0; 32];
        stream.read_exact(&mut chunk).expect("answered");
        let mut payload = vec![0; chunk[31].into()];
        stream.read_exact(&mut payload).expect("answered");
        payload.get(3).copied()
    };
    let (trim, zero, no_hole, fast) = (4, 6, 2, 16);
    assert_eq!(ask(zero, fast), None);
    assert_eq!(
        scene.asked(&["status", "0"]),
        format!("0 {} thin 0 -", size / 512)
    );
    client.write(1 << 50, &[1; BLOCK]).expect("written");
    assert_eq!(ask(trim, 0), None);
    assert_eq!(client.read(1 << 50, 9), Ok(vec![0; 9]));
    assert_eq!(ask(zero, no_hole), Some(28), "there is no space for that");
    assert_eq!(ask(trim, 1), None);
    drop((client, stream));
    scene.stop();
}
