//! Thin devices: made, as snapshots too, and deleted; what is known of each.

use super::{PoolMetadata, Thin, detail_of, no_device};
use crate::error::{Error, ErrorKind, Result};
use crate::pdata::TreeKind;
use crate::pdata::txn::cell;
use crate::thin::DeviceDetail;
use crate::units::{MAX_THIN_ID, MAX_TIME, MetadataBlock, ThinId};

impl PoolMetadata {
    pub(super) fn root_of(&self, id: ThinId) -> Result<MetadataBlock> {
        let found = self
            .txn
            .lookup(TreeKind::TopLevel, self.current.mapping_root, id.0)?;
        found
            .map(|v| MetadataBlock(v[0]))
            .ok_or_else(|| no_device(id))
    }

    /// What the pool knows of a device.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Damaged`.
    pub fn details(&self, id: ThinId) -> Result<DeviceDetail> {
        self.refuse_if_failed()?;
        if let Some(thin) = self.thins.get(&id.0) {
            return Ok(thin.detail);
        }
        let root = self.current.details_root;
        match self.txn.lookup(TreeKind::Details, root, id.0) {
            Ok(Some(found)) => Ok(detail_of(found)),
            _ if self.is_rescue => self.made_up_details(id),
            Ok(None) => Err(no_device(id)),
            Err(e) => Err(e),
        }
    }

    /// What stands in for lost details: everything may be shared, and mapped.
    fn made_up_details(&self, id: ThinId) -> Result<DeviceDetail> {
        let root = self.root_of(id)?;
        let last = self.txn.last_known_key(TreeKind::Mappings, root);
        let last = last.map_or(None, |(key, _)| key);
        Ok(DeviceDetail {
            mapped_blocks: last.unwrap_or(0).saturating_add(1),
            transaction_id: self.current.transaction_id,
            creation_time: 0,
            snapshotted_time: self.current.time,
        })
    }

    pub(super) fn set_details(&mut self, id: ThinId, detail: DeviceDetail) {
        let thin = Thin {
            detail,
            is_changed: true,
        };
        self.thins.insert(id.0, thin);
    }

    /// The ids of all devices, ascending.
    ///
    /// # Errors
    /// `Io`, `Damaged`.
    pub fn devices(&self) -> Result<Vec<ThinId>> {
        self.refuse_if_failed()?;
        let root = self.current.mapping_root;
        let entries = self.txn.cursor(TreeKind::TopLevel, root, 0)?;
        entries.map(|entry| Ok(ThinId(entry?.0))).collect()
    }

    fn refuse_if_taken(&self, id: ThinId) -> Result<()> {
        if id.0 > MAX_THIN_ID {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("device id {id}: 0 to {MAX_THIN_ID} are possible"),
            ));
        }
        match self.details(id) {
            Ok(_) => Err(Error::new(
                ErrorKind::Exists,
                format!("thin device {id} exists already"),
            )),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn set_root(&mut self, id: ThinId, root: MetadataBlock) -> Result<()> {
        let top = self.current.mapping_root;
        let changed = self
            .txn
            .insert(TreeKind::TopLevel, top, id.0, cell(root.0))?;
        self.current.mapping_root = changed.root;
        Ok(())
    }

    /// Makes a device without mappings.
    ///
    /// # Errors
    /// `Exists`, `InvalidArgument` for an id past 24 bits, `NoSpace`, `Io`, `Damaged`.
    pub fn create_thin(&mut self, id: ThinId) -> Result<()> {
        self.refuse_if_taken(id)?;
        self.begin()?;
        let root = self.txn.new_tree(TreeKind::Mappings)?;
        self.set_root(id, root)?;
        let detail = DeviceDetail {
            mapped_blocks: 0,
            transaction_id: self.current.transaction_id,
            creation_time: self.current.time,
            snapshotted_time: self.current.time,
        };
        self.set_details(id, detail);
        Ok(())
    }

    /// Makes device `id` a snapshot of `origin`. I/O to the origin must be quiesced.
    ///
    /// # Errors
    /// `Exists`, `NotFound`, `InvalidArgument` for an id past 24 bits or when the clock is at its end, 2^24 - 1, `NoSpace`, `Io`,
    /// `Damaged`.
    pub fn create_snap(&mut self, id: ThinId, origin: ThinId) -> Result<()> {
        self.refuse_if_taken(id)?;
        let of_origin = self.details(origin)?;
        if self.current.time >= MAX_TIME {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "the snapshot clock is at its end, {MAX_TIME}: a later time does not fit a mapping; copy the data to a new pool"
                ),
            ));
        }
        self.begin()?;
        let root = self.root_of(origin)?;
        self.txn.increment_metadata(root.0)?;
        self.set_root(id, root)?;
        self.current.time += 1;
        let time = self.current.time;
        let detail = DeviceDetail {
            mapped_blocks: of_origin.mapped_blocks,
            transaction_id: self.current.transaction_id,
            creation_time: time,
            snapshotted_time: time,
        };
        self.set_details(id, detail);
        let of_origin = DeviceDetail {
            snapshotted_time: time,
            ..of_origin
        };
        self.set_details(origin, of_origin);
        Ok(())
    }

    /// Deletes a device and all that no other one shares.
    ///
    /// # Errors
    /// `NotFound`, `NoSpace`, `Io`, `Damaged`.
    pub fn delete_device(&mut self, id: ThinId) -> Result<()> {
        self.details(id)?;
        self.begin()?;
        self.thins.remove(&id.0);
        let details = self.current.details_root;
        if let Some(changed) = self.txn.remove(TreeKind::Details, details, id.0)? {
            self.current.details_root = changed.root;
        }
        let top = self.current.mapping_root;
        let changed = self
            .txn
            .remove(TreeKind::TopLevel, top, id.0)?
            .ok_or_else(|| no_device(id))?;
        self.current.mapping_root = changed.root;
        match changed.old {
            Some(old) => self.txn.decrement_value(TreeKind::TopLevel, old[0]),
            None => Ok(()),
        }
    }
}
