//! The model as a player has it, which costs nothing but a look at whether there is one.

use super::{Verified, Verify};
use crate::error::Result;
use crate::pool::{Bio, BioResult, Effect, JobId, Mapped, Message};
use crate::thin::PoolMetadata;
use crate::units::ThinId;

/// The model, if there is to be one.
#[derive(Debug, Default)]
pub(in crate::replay) struct Watch(Option<Box<Verify>>);

/// Each method tells the model something, by the method of [`Verify`] that has its name.
macro_rules! tell {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => {
        impl Watch {
            $(
                #[inline]
                pub(in crate::replay) fn $name(&mut self, $($arg: $type),*) {
                    if let Some(verify) = &mut self.0 {
                        verify.$name($($arg),*);
                    }
                }
            )*
        }
    };
}

tell! {
    begin(id: ThinId, bio: &Bio);
    mapped(mapped: &Mapped);
    effect(effect: &Effect);
    landed(bio: &Bio);
    done(job: JobId);
    end(bio: &Bio, result: BioResult);
    message(message: Message);
    opened(id: ThinId, origin_sectors: Option<u64>);
}

impl Watch {
    /// Watches a pool that is not used yet; one virtual block of `one_of`.
    ///
    /// # Errors
    /// `Io`, `Damaged`: its metadata cannot be read.
    pub(in crate::replay) fn begin_with(
        metadata: &PoolMetadata,
        size: u64,
        is_unzeroed: bool,
        one_of: u64,
    ) -> Result<Self> {
        let verify = Verify::new(metadata, size, is_unzeroed, one_of)?;
        Ok(Self(Some(Box::new(verify))))
    }

    /// A message is about to be carried out.
    ///
    /// # Errors
    /// `Io`, `Damaged`: the metadata cannot be read.
    pub(in crate::replay) fn before_message(
        &mut self,
        message: Message,
        metadata: &PoolMetadata,
    ) -> Result<()> {
        match &mut self.0 {
            Some(verify) => verify.before_message(message, metadata),
            None => Ok(()),
        }
    }

    /// Looks at everything that every thin device has, at the end.
    ///
    /// # Errors
    /// `Io`, `Damaged`: the metadata cannot be read.
    pub(in crate::replay) fn sweep(&mut self, metadata: &PoolMetadata) -> Result<()> {
        match &mut self.0 {
            Some(verify) => verify.sweep(metadata),
            None => Ok(()),
        }
    }

    /// True if there is a model, which wants to see every bio.
    #[inline]
    pub(in crate::replay) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// What came of it so far; none without a model.
    pub(in crate::replay) fn found(&self) -> Option<&Verified> {
        self.0.as_ref().map(|verify| &verify.found)
    }
}
