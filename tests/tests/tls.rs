//! `thin_serve --tls-certificates`, with the TLS of libnbd and certificates of our own.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::serve::Scene;
use crate::support::{folder, program};

/// A folder with a certificate authority, a server's certificate and a client's.
struct Certificates(TempDir);

impl Certificates {
    fn new() -> Self {
        let this = Self(folder());
        let openssl = |words: &str| {
            let words = words.split(' ').map(|word| match word.strip_prefix('@') {
                Some(name) => this.path(name).display().to_string(),
                None => word.to_owned(),
            });
            program("openssl", words).run().expect(0);
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        openssl(&format!(
            "req -x509 {key} -keyout @ca-key.pem -out @ca-cert.pem -days 2 -subj /CN=authority"
        ));
        fs::write(this.path("names"), "subjectAltName=DNS:localhost\n").expect("written");
        for who in ["server", "client"] {
            openssl(&format!(
                "req {key} -keyout @{who}-key.pem -out @{who}.csr -subj /CN={who}"
            ));
            openssl(&format!(
                "x509 -req -in @{who}.csr -CA @ca-cert.pem -CAkey @ca-key.pem -CAcreateserial -out @{who}-cert.pem -days 2 -extfile @names"
            ));
        }
        // One who trusts the authority, and has no certificate.
        fs::create_dir(this.path("stranger")).expect("made");
        fs::copy(this.path("ca-cert.pem"), this.path("stranger/ca-cert.pem")).expect("copied");
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn shown(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

#[test]
fn clients_with_tls_copy_in_and_out_from_wherever_they_are() {
    let (scene, certificates) = (Scene::new(256, 1 << 20), Certificates::new());
    let data: Vec<u8> = (0..8 << 20).map(|i: u32| (i / 7 % 251) as u8).collect();
    fs::write(scene.path("in"), &data).expect("written");
    let path = |name: &str| scene.path(name).display().to_string();
    let folder = certificates.shown("");
    // Where others could come, nothing is said without TLS; on this machine it can be.
    for (n, (address, code)) in [("0.0.0.0", 1), ("127.0.0.1", 0)].into_iter().enumerate() {
        let clients = format!(
            "place=localhost:${{uri##*:}}; tls=\"nbds://$place?tls-certificates={folder}\"; \
             nbdcopy --flush {} \"$tls\" && nbdcopy \"$tls\" {} && nbdinfo --list \"$tls\" >/dev/null || exit 9; nbdinfo --size \"nbd://$place\"",
            path("in"),
            path(&format!("out{n}")),
        );
        let at = format!("tcp:{address}:0");
        let served = [
            "--create",
            "--thin",
            "0:8m",
            "--nbd",
            &at,
            "--tls-certificates",
            &folder,
            "--run",
            &clients,
        ];
        scene.run(&served).expect(code);
        assert!(fs::read(path(&format!("out{n}"))).expect("copied") == data);
    }
}

#[test]
fn whom_the_authority_does_not_know_is_not_let_in() {
    let (scene, certificates) = (Scene::new(256, 1 << 20), Certificates::new());
    let clients = format!(
        "place=localhost:${{uri##*:}}; nbdinfo --size \"nbds://$place?tls-certificates={}\" || exit 8; \
         nbdinfo --size \"nbds://$place?tls-certificates={}\" && exit 9; exit 0",
        certificates.shown(""),
        certificates.shown("stranger"),
    );
    let folder = certificates.shown("");
    let served = [
        "--create",
        "--thin",
        "0:8m",
        "--nbd",
        "tcp:127.0.0.1:0",
        "--tls-certificates",
        &folder,
    ];
    scene
        .run(&[&served[..], &["--tls-verify-peer", "--run", &clients]].concat())
        .expect(0);
    // Without that everybody is.
    scene
        .run(&[&served[..], &["--run", &clients]].concat())
        .expect(9);
}

#[test]
fn certificates_that_cannot_be_used_are_refused() {
    let (scene, certificates) = (Scene::new(8, 1 << 20), Certificates::new());
    let refused = |folder: &str, name: &str| {
        let served = [
            "--create",
            "--thin",
            "0:8m",
            "--tls-certificates",
            folder,
            "--run",
            "true",
        ];
        scene.run(&served).expect(1).expect_stderr(&[name]);
    };
    refused(&certificates.shown("stranger"), "server-cert.pem");
    fs::write(certificates.path("server-key.pem"), "no key").expect("written");
    refused(&certificates.shown(""), "server-key.pem");
    fs::write(certificates.path("server-cert.pem"), "").expect("written");
    refused(&certificates.shown(""), "server-cert.pem");
}
