//! What a manager may ask of a running pool.

use crate::error::{Error, ErrorKind, Result};
use crate::pool::Features;
use crate::runtime::{Activation, DataDevice, Runtime};
use crate::units::{MAX_THIN_ID, ThinId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;

/// A request.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// A message to the pool.
    Message {
        /// Its words, as dmsetup sends them.
        message: String,
    },
    /// The status line of the pool, or of a thin device.
    Status {
        /// Which device.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        thin: Option<u64>,
    },
    /// The table line of the pool, or of a thin device.
    Table {
        /// Which device.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        thin: Option<u64>,
    },
    /// Finish what was accepted, commit, and hold back what comes then.
    Suspend,
    /// Go on, with other features if any are named.
    Resume {
        /// The feature words of the new table.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        features: Option<Vec<String>>,
    },
    /// Use all of devices that have grown; make backing files larger first.
    Resize {
        /// Data blocks.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        data: Option<u64>,
        /// Metadata blocks.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        metadata: Option<u64>,
    },
    /// Export a thin device.
    Activate {
        /// Which.
        thin: u64,
        /// Its size in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
        /// The file or device that has what was never written.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        origin: Option<PathBuf>,
    },
    /// No longer export a thin device.
    Deactivate {
        /// Which.
        thin: u64,
    },
    /// The ids of the devices that are exported.
    Exported,
    /// Events as they happen.
    Events {
        /// Those behind this number, instead of only those that are yet to come.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<u64>,
    },
    /// What the pool did so far.
    Stats,
    /// The same as text for Prometheus.
    Metrics,
}

fn thin_id(id: u64) -> Result<ThinId> {
    match id <= MAX_THIN_ID {
        true => Ok(ThinId(id)),
        false => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("device id {id} is past the last, {MAX_THIN_ID}"),
        )),
    }
}

impl Request {
    /// Reads a line.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub fn from_json(line: &[u8]) -> Result<Self> {
        serde_json::from_slice(line)
            .map_err(|e| Error::with_source(ErrorKind::InvalidArgument, "no request", e))
    }

    /// Does what is wanted; `Events` is the server's own.
    ///
    /// # Errors
    /// Those of the kernel, by kind.
    pub(super) fn carry_out(self, runtime: &Runtime) -> Result<Value> {
        let nothing = |()| Value::Null;
        match self {
            Self::Message { message } => runtime.message(message.parse()?).map(nothing),
            Self::Status { thin: None } => Ok(runtime.status()?.to_string().into()),
            Self::Status { thin: Some(id) } => {
                Ok(runtime.thin_status(thin_id(id)?)?.to_string().into())
            }
            Self::Table { thin: None } => Ok(runtime.table()?.to_string().into()),
            Self::Table { thin: Some(id) } => {
                Ok(runtime.thin_table(thin_id(id)?)?.to_string().into())
            }
            Self::Suspend => runtime.suspend().map(nothing),
            Self::Resume { features } => {
                let features = features
                    .map(|words| Features::from_words(&words))
                    .transpose()?;
                runtime.resume(features).map(nothing)
            }
            Self::Resize { data, metadata } => runtime.grow(data, metadata).map(nothing),
            Self::Activate { thin, size, origin } => {
                let open = |path: PathBuf| DataDevice::open_origin(&path).map(Arc::new);
                let origin = origin.map(open).transpose()?;
                runtime
                    .activate(thin_id(thin)?, Activation { size, origin })
                    .map(nothing)
            }
            Self::Deactivate { thin } => runtime.deactivate(thin_id(thin)?).map(nothing),
            Self::Exported => Ok(json!(runtime.exported()?)),
            Self::Stats => Ok(json!(runtime.stats()?)),
            Self::Metrics => Ok(runtime.stats()?.prometheus().into()),
            Self::Events { .. } => Ok(Value::Null),
        }
    }
}
