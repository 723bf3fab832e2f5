//! What a sector holds, as a number, and what the sectors of a block hold.

use std::fmt;
use std::sync::Arc;

/// What a sector holds. A write gives each of its sectors a number of its own, so that data that is in the wrong place is told from
/// data that is not. There are 2^30 of them, after which (512 GiB) they come again; sectors of the data device and of an external
/// origin have 2^29 each.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag(u32);

/// Numbers of a class of sectors that were there before.
const PLACES: u64 = (1 << 29) - 8;

impl Tag {
    const ORIGIN: u32 = 1 << 30;
    const PRIOR: u32 = Self::ORIGIN | 1 << 29;
    const OR_HOLE: u32 = 1 << 31;

    /// Zeros.
    pub(super) const ZERO: Self = Self(0);
    /// Expected only: what a sector that was never written holds: zeros, or what the external origin has.
    pub(super) const HOLE: Self = Self(!Self::OR_HOLE);
    /// Expected only: anything.
    pub(super) const ANY: Self = Self(Self::HOLE.0 - 1);
    /// Found only: of a copy whose source changed meanwhile.
    pub(super) const TORN: Self = Self(Self::HOLE.0 - 2);
    /// Found only: what a discard of the data device left.
    pub(super) const DISCARDED: Self = Self(Self::HOLE.0 - 3);

    /// What sector `sector` of an external origin holds.
    pub(super) const fn origin(sector: u64) -> Self {
        Self(Self::ORIGIN | (sector % PLACES) as u32)
    }

    /// What sector `sector` of the data device held before the replay: data of somebody else, or of the pool that there was.
    pub(super) const fn prior(sector: u64) -> Self {
        Self(Self::PRIOR | (sector % PLACES) as u32)
    }

    /// Numbers for a write of so many sectors: the first of them, `next` if they fit.
    pub(super) fn of_write(next: &mut u32, sectors: u64) -> Self {
        let most = u64::from(Self::ORIGIN);
        if *next == 0 || u64::from(*next) + sectors > most {
            *next = 1;
        }
        let first = Self(*next);
        // No bio has as many sectors as there are numbers, but if one had, its first ones would come again.
        *next += sectors.min(most - 1 - u64::from(*next)) as u32;
        first
    }

    /// What the sector `by` further on holds that is of the same kind.
    pub(super) const fn plus(self, by: u64) -> Self {
        let flag = self.0 & Self::OR_HOLE;
        let class = self.0 & Self::PRIOR;
        let low = (self.0 & !Self::PRIOR & !Self::OR_HOLE) as u64 + by;
        match class {
            Self::ORIGIN | Self::PRIOR => Self(flag | class | (low % PLACES) as u32),
            _ => Self(flag | (low % Self::ORIGIN as u64) as u32),
        }
    }

    /// This, or what a hole holds.
    pub(super) fn or_hole(self) -> Self {
        match self {
            Self::HOLE | Self::ANY => self,
            Self(bits) => Self(bits | Self::OR_HOLE),
        }
    }

    /// It may be that of a hole.
    pub(super) fn may_be_hole(self) -> bool {
        self == Self::HOLE || self == Self::ANY || self.0 & Self::OR_HOLE != 0
    }

    /// The one thing that it is, unless it is that of a hole.
    pub(super) fn but_for_hole(self) -> Self {
        Self(self.0 & !Self::OR_HOLE)
    }

    /// It was written during the replay.
    pub(super) fn is_of_write(self) -> bool {
        (1..Self::ORIGIN).contains(&self.0)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// In words.
impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let low = self.but_for_hole().0 & !Self::PRIOR;
        match self.but_for_hole() {
            Self::ZERO => f.write_str("zeros"),
            Self::HOLE => f.write_str("what was never written"),
            Self::ANY => f.write_str("anything"),
            Self::TORN => f.write_str("a copy whose source changed meanwhile"),
            Self::DISCARDED => f.write_str("what a discard of the data device left"),
            Self(bits) => match bits & Self::PRIOR {
                Self::ORIGIN => write!(f, "sector {low} of the external origin"),
                Self::PRIOR => write!(f, "what sector {low} of the data device held before"),
                _ => write!(f, "data of write {bits}"),
            },
        }?;
        match self.0 & Self::OR_HOLE {
            0 => Ok(()),
            _ => f.write_str(" or, discarded, what was never written"),
        }
    }
}

/// What the sectors of a block hold, or of a part of it. A block that was written as a whole takes no memory of its own, others take 4
/// bytes for each sector.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// All the same.
    Same(Tag),
    /// This, and what follows it.
    Run(Tag),
    /// Each what is said here.
    Each(Arc<[Tag]>),
}

impl Content {
    /// What the sector at `at` holds.
    pub(super) fn at(&self, at: u64) -> Tag {
        match self {
            Self::Same(tag) => *tag,
            Self::Run(tag) => tag.plus(at),
            Self::Each(tags) => tags.get(at as usize).copied().unwrap_or(Tag::TORN),
        }
    }

    fn tags(&self, sectors: u64) -> impl Iterator<Item = Tag> + '_ {
        (0..sectors).map(|at| self.at(at))
    }

    /// A part of it.
    pub(super) fn part(&self, at: u64, sectors: u64) -> Self {
        match self {
            Self::Same(tag) => Self::Same(*tag),
            Self::Run(tag) => Self::Run(tag.plus(at)),
            Self::Each(_) => Self::Each((at..at + sectors).map(|at| self.at(at)).collect()),
        }
    }

    /// Replaces a part of a block of `size` sectors.
    pub(super) fn set(&mut self, at: u64, sectors: u64, content: &Self, size: u64) {
        if at == 0 && sectors >= size {
            *self = content.clone();
            return;
        }
        if !matches!(self, Self::Each(_)) {
            *self = Self::Each(self.tags(size).collect());
        }
        let Self::Each(tags) = self else { return };
        let places = Arc::make_mut(tags).iter_mut().skip(at as usize);
        for (place, tag) in places.zip(content.tags(sectors)) {
            *place = tag;
        }
    }

    /// The same, or what a hole holds.
    pub(super) fn or_hole(&self) -> Self {
        match self {
            Self::Same(tag) => Self::Same(tag.or_hole()),
            Self::Run(tag) => Self::Run(tag.or_hole()),
            Self::Each(tags) => Self::Each(tags.iter().map(|tag| tag.or_hole()).collect()),
        }
    }

    /// Two of so many sectors hold the same.
    pub(super) fn is_same(&self, other: &Self, sectors: u64) -> bool {
        match (self, other) {
            (Self::Same(a), Self::Same(b)) | (Self::Run(a), Self::Run(b)) => a == b,
            (Self::Each(a), Self::Each(b)) if Arc::ptr_eq(a, b) => true,
            _ => self.tags(sectors).eq(other.tags(sectors)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_tags_do_not_run_into_each_other() {
        for tag in [Tag::origin(PLACES - 1), Tag::prior(PLACES - 1)] {
            let next = tag.plus(1);
            assert!(!next.is_of_write() && next != Tag::ZERO, "{next}");
        }
        assert_eq!(Tag::origin(PLACES - 1).plus(1), Tag::origin(0));
        assert_eq!(Tag::prior(7).plus(1).or_hole(), Tag::prior(8).or_hole());
        let mut next = Tag::ORIGIN - 3;
        let last = Tag::of_write(&mut next, 3);
        assert!(last.plus(2).is_of_write());
        let first = Tag::of_write(&mut next, 8);
        assert_eq!(first, Tag(1));
        for special in [Tag::HOLE, Tag::ANY, Tag::TORN, Tag::DISCARDED] {
            assert_ne!(special, Tag::prior(PLACES - 1));
            assert!(!special.is_of_write());
        }
    }

    #[test]
    fn a_part_of_a_block_is_replaced_and_no_other() {
        let mut block = Content::Run(Tag::prior(80));
        block.set(2, 3, &Content::Same(Tag::ZERO), 8);
        let tags: Vec<Tag> = block.tags(8).collect();
        let [a, b, f, g, h] = [80, 81, 85, 86, 87].map(Tag::prior);
        assert_eq!(tags, [a, b, Tag::ZERO, Tag::ZERO, Tag::ZERO, f, g, h]);
        let before = block.clone();
        block.set(0, 8, &Content::Run(Tag::origin(0)), 8);
        assert!(block.is_same(&Content::Run(Tag::origin(0)), 8));
        assert_eq!(before.at(0), a, "what was shared did not change");
    }
}
