//! From the command line to a pool that is served, and to its end.

use std::fs;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use anyhow::Context;
use listenfd::ListenFd;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use thintools::io::{Access, AlignedBuffer, BlockEngine, open_read};
use thintools::observer::Silent;
use thintools::pool::{Features, Message};
#[cfg(feature = "devtools")]
use thintools::runtime::Faults;
use thintools::runtime::control::Control;
use thintools::runtime::fuse::Fuse;
use thintools::runtime::nbd::{Listener, Server, Tls};
use thintools::runtime::{Activation, DataDevice, Options, Runtime, bind_socket};
use thintools::tools::{Overrides, repair};
use thintools::units::{MetadataBlock, ThinId};
use thintools::{Error, ErrorKind};

use super::child::Running;
use super::new_pool::Made;
use super::ready::Ready;
use super::{Args, Nbd};
use crate::commands::ctl::refuse_damage;
use crate::commands::repair::say_report;
use crate::exit::Exit;
use crate::output;
use crate::session::Session;

/// Why it ends.
pub(super) enum End {
    /// The first signal, or what is to the same effect.
    Signal(i32),
    /// The command of --run ended, with this status.
    Command(u8),
}

/// Sockets to serve NBD on.
#[derive(Default)]
struct Sockets {
    listeners: Vec<Listener>,
    /// The first of them, for --run.
    first: Option<Address>,
    /// Made here, and removed at the end.
    paths: Vec<PathBuf>,
    /// Has the socket that nobody named.
    _folder: Option<tempfile::TempDir>,
}

/// How clients reach a socket.
enum Address {
    Unix(PathBuf),
    Tcp(String),
}

/// What a path cannot have in a URI.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

impl Address {
    fn uri(&self, export: &str) -> String {
        match self {
            Self::Unix(path) => {
                let path = percent_encode(path.as_os_str().as_bytes(), ENCODED);
                format!("nbd+unix:///{export}?socket={path}")
            }
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

impl Sockets {
    /// Those of the command line, those that whoever started the command had opened, or one of our own for --run.
    fn open(args: &Args) -> anyhow::Result<Self> {
        let mut this = Self::default();
        for nbd in &args.nbd {
            match nbd {
                Nbd::Unix(path) => this.add_unix(path)?,
                Nbd::Tcp(address) => {
                    let listener = TcpListener::bind(address)
                        .with_context(|| format!("cannot listen on {address}"))?;
                    let address = listener
                        .local_addr()
                        .map_or_else(|_| address.clone(), |at| at.to_string());
                    this.first.get_or_insert(Address::Tcp(address));
                    this.listeners.push(Listener::Tcp(listener));
                }
            }
        }
        let mut given = ListenFd::from_env();
        for at in 0..given.len() {
            let listener = match given.take_unix_listener(at) {
                Ok(listener) => listener.map(Listener::Unix),
                Err(_) => given
                    .take_tcp_listener(at)
                    .with_context(|| {
                        format!("socket {at} of LISTEN_FDS is neither a Unix nor a TCP socket")
                    })?
                    .map(Listener::Tcp),
            };
            this.listeners.extend(listener);
        }
        if this.listeners.is_empty() && args.run.is_some() {
            let folder = tempfile::tempdir().context("cannot make a folder for the socket")?;
            this.add_unix(&folder.path().join("nbd.sock"))?;
            this._folder = Some(folder);
        }
        if this.listeners.is_empty() && args.fuse.is_none() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "there is nowhere to serve: give --nbd, --fuse, --run, or sockets in LISTEN_FDS",
            )
            .into());
        }
        Ok(this)
    }

    fn add_unix(&mut self, path: &Path) -> anyhow::Result<()> {
        self.listeners.push(Listener::Unix(bind_socket(path)?));
        self.first.get_or_insert(Address::Unix(path.into()));
        self.paths.push(path.into());
        Ok(())
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.paths {
            // Somebody else may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

/// Serves a pool until a signal comes or the command ends.
pub(crate) fn run(args: Args) -> anyhow::Result<Exit> {
    let ready = Ready::take(args.ready_fd)?;
    let (end, ends) = mpsc::channel();
    watch_signals(end.clone())?;
    if args.check {
        check(&args)?;
    }
    let certificates = args.tls_certificates.as_deref();
    let tls = certificates
        .map(|folder| Tls::open(folder, args.tls_verify_peer))
        .transpose()?;
    let made = Made::files(&args)?;
    let runtime = open(&args)?;
    let mut sockets = Sockets::open(&args)?;
    // From here on somebody may use it.
    made.keep();
    let control = args
        .control
        .as_deref()
        .map(|path| Control::serve(path, Arc::clone(&runtime)))
        .transpose()?;
    if let Some(how) = args.autoextend {
        runtime.autoextend(how)?;
    }
    let listeners = std::mem::take(&mut sockets.listeners);
    let is_only_fuse = listeners.is_empty();
    let server = Server::start(listeners, runtime.clone(), tls)?;
    let fuse = args
        .fuse
        .as_deref()
        .map(|folder| mount(folder, &runtime, is_only_fuse.then(|| end.clone())))
        .transpose()?;
    say_events(&runtime, args.quiet)?;
    ready.tell()?;
    let child = match &args.run {
        Some(command) => Some(start(command, &args, &runtime, &sockets, end)?),
        None => None,
    };
    let why = ends.recv().unwrap_or(End::Signal(SIGTERM));
    if let (Some(child), End::Signal(signal)) = (child, &why) {
        child.stop(*signal);
    }
    if let Some(fuse) = fuse {
        fuse.stop();
    }
    server.stop();
    let stopped = runtime.stop();
    drop(control);
    drop(sockets);
    stopped.context("what was not flushed may be lost")?;
    Ok(match why {
        End::Signal(_) | End::Command(0) => Exit::Ok,
        End::Command(status) => Exit::Command(status),
    })
}

/// Serves files in a folder; `end` is told when somebody has unmounted it.
fn mount(folder: &Path, runtime: &Arc<Runtime>, end: Option<Sender<End>>) -> anyhow::Result<Fuse> {
    let at_end = move || {
        // Whoever unmounts what is served nowhere else wants it to end.
        let _ = end.map(|end| end.send(End::Signal(SIGTERM)));
    };
    Ok(Fuse::mount(folder, runtime.clone(), at_end)?)
}

/// Checks the metadata as thin_check does, if there is any.
fn check(args: &Args) -> anyhow::Result<()> {
    let session = Session::new("Checking", args.quiet)?;
    if args.create && !args.metadata.exists() {
        return Ok(());
    }
    let engine = open_read(&args.metadata, Access::Exclusive)?;
    let mut block = AlignedBuffer::new(1);
    let read = engine.read(MetadataBlock(0), block.blocks_mut(1));
    if args.create && read.is_ok() && block.blocks(1).iter().all(|&byte| byte == 0) {
        return Ok(());
    }
    refuse_damage(&*engine, &args.metadata, &session)?;
    Ok(())
}

/// Tells of the first signal; the second ends the process. A file that may not get longer is an error of whoever writes to it.
fn watch_signals(end: Sender<End>) -> anyhow::Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default())?;
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for (n, signal) in signals.forever().enumerate() {
                if n > 0 || end.send(End::Signal(signal)).is_err() {
                    std::process::exit(Exit::Interrupted.code().into());
                }
            }
        })?;
    Ok(())
}

/// Opens the pool, or makes it, with the devices that are to be exported.
fn open(args: &Args) -> anyhow::Result<Arc<Runtime>> {
    let mut features = Features::from_words(&args.feature)?;
    features.error_if_no_space |= args.patience().is_none();
    let mut options = Options {
        is_direct: args.direct,
        is_read_only: args.read_only,
        create: args.create.then(|| args.new_block_size()),
        low_water_blocks: args.low_water,
        features,
        no_space_timeout: args.patience().flatten(),
        cache_bytes: usize::try_from(args.metadata_cache.saturating_mul(512))?,
        #[cfg(feature = "devtools")]
        interceptor: Some(Arc::new(Faults::new(args.fault.clone()))),
        ..Options::new(&args.metadata, &args.data)
    };
    if let Some(how) = args.autoextend {
        let data = DataDevice::open(&args.data, false)?;
        let blocks = data.sectors()? / u64::from(args.new_block_size());
        options.low_water_blocks = options.low_water_blocks.max(how.low_water(blocks));
    }
    let runtime = Arc::new(match args.read_only {
        true => open_to_read(args, &options)?,
        false => Runtime::open(&options)?,
    });
    if args.thin.is_empty() {
        runtime.export_all();
    }
    for (id, size) in &args.thin {
        activate(args, &runtime, *id, *size)?;
    }
    Ok(runtime)
}

/// Opens what can be read. Where the superblock, a part of the top-level tree or an inner node is lost, what they led to is looked for.
fn open_to_read(args: &Args, options: &Options) -> anyhow::Result<Runtime> {
    let engine: Arc<dyn BlockEngine> = Arc::from(open_read(&args.metadata, Access::Exclusive)?);
    let mending = Arc::new(repair::Mending(Arc::clone(&engine)));
    let opened = Runtime::open_to_read(Arc::clone(&mending) as _, options).and_then(|runtime| {
        repair::refuse_lost_nodes(&*mending, &Silent)?;
        Ok(runtime)
    });
    let why = match opened {
        Err(e) if e.kind() == ErrorKind::Damaged => e,
        other => return Ok(other?),
    };
    let session = Session::new("Looking for what is left", args.quiet)?;
    let why = anyhow::Error::from(why);
    session.say(&format!("{}: {why:#}", output::program()));
    let wanted = repair::Options {
        overrides: Overrides {
            data_block_size: args.block_size,
            ..Overrides::default()
        },
        ..repair::Options::default()
    };
    let shown = args.metadata.display();
    let found = repair::rescue(engine, &wanted, &session)
        .with_context(|| format!("cannot find the devices in {shown}"))?;
    say_report(&found.report, &session);
    if found.report.devices.is_empty() {
        let what = format!(
            "of no thin device the mappings are left in {shown}: there is nothing to serve; make sure that it is all of the metadata"
        );
        return Err(Error::new(ErrorKind::Damaged, what).into());
    }
    Ok(Runtime::open_to_read(found.engine, options)?)
}

fn activate(args: &Args, runtime: &Runtime, id: ThinId, size: Option<u64>) -> anyhow::Result<()> {
    let origin = args.origin.iter().find(|(of, _)| *of == id);
    let open = |(_, path): &(ThinId, PathBuf)| DataDevice::open_origin(path).map(Arc::new);
    let activation = Activation {
        size,
        origin: origin.map(open).transpose()?,
    };
    match runtime.activate(id, activation.clone()) {
        Err(e) if e.kind() == ErrorKind::NotFound && args.create => {
            runtime.message(Message::CreateThin(id))?;
            runtime.activate(id, activation)?;
        }
        Err(e) if e.kind() == ErrorKind::NotFound && !args.read_only => {
            return Err(e
                .context("--create makes devices that are not there")
                .into());
        }
        other => other?,
    }
    Ok(())
}

/// Prints events on standard error.
fn say_events(runtime: &Arc<Runtime>, quiet: bool) -> anyhow::Result<()> {
    let runtime = Arc::downgrade(runtime);
    let say = move || {
        let mut last = 0;
        while let Some(events) = runtime
            .upgrade()
            .and_then(|r| r.events().after(last, Duration::from_secs(1)))
        {
            for event in events {
                last = event.number;
                if !quiet {
                    output::stderr_line(&format!(
                        "{}: {}: {}",
                        output::program(),
                        event.event,
                        event.detail
                    ));
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("events".into())
        .spawn(say)?;
    Ok(())
}

/// Starts the command of --run.
fn start(
    command: &str,
    args: &Args,
    runtime: &Runtime,
    sockets: &Sockets,
    end: Sender<End>,
) -> anyhow::Result<Running> {
    let export = match args.thin.first() {
        Some((id, _)) => id.to_string(),
        None => runtime
            .exported()?
            .first()
            .map_or_else(String::new, ToString::to_string),
    };
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    if let Some(folder) = &args.fuse {
        shell.env("fuse", folder);
    }
    if let Some(address) = &sockets.first {
        shell.env("uri", address.uri(&export));
        if let Address::Unix(path) = address {
            shell.env("unixsocket", path);
        }
    }
    Running::start(shell, end)
}
