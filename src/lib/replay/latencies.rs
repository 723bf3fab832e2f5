//! How long requests took: histograms that lose three digits and nothing else, also on their way through a report.

use crate::pool::Reason;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use flate2::read::ZlibDecoder;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{
    Deserializer as HdrReader, Serializer as _, V2DeflateSerializer,
};
use serde::ser::{Error as _, SerializeStruct};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;
use std::io::Read;

/// Digits that a histogram keeps.
const DIGITS: u8 = 3;
/// 146 years. At the very end of the range a histogram does not come back as it was.
const LONGEST: u64 = 1 << 62;
/// Bytes in front of the counts of an encoded histogram, and in front of what is compressed.
const HEADER: usize = 40;
const COMPRESSED_HEADER: usize = 8;
/// What the counts may take: there are 55 296 of them, of 9 bytes at most.
const MOST_BYTES: usize = 1 << 19;

/// Latencies in nanoseconds, of one class of requests. As JSON: their number, percentiles, the longest, and all of it as a histogram of
/// HdrHistogram (V2, compressed, base64). Only that is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        // It grows with what is recorded.
        #[expect(clippy::expect_used, reason = "3 is a legal number of digits")]
        Self(Histogram::new(DIGITS).expect("3 is a legal number of digits"))
    }
}

impl Latencies {
    /// So many that are equally long.
    fn record(&mut self, nanos: u64, count: u64) {
        // It grows with what it is told.
        self.0.record_n(nanos.min(LONGEST), count).ok();
    }

    /// How many.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The latency that this share of them does not exceed.
    pub fn percentile(&self, percent: f64) -> u64 {
        self.0.value_at_percentile(percent)
    }

    /// The longest.
    pub fn max(&self) -> u64 {
        self.0.max()
    }

    /// Value and how many percent do not exceed it, in ascending steps.
    pub fn curve(&self) -> Vec<(u64, f64)> {
        let steps = self.0.iter_quantiles(5);
        steps
            .map(|v| (v.value_iterated_to(), 100.0 * v.quantile()))
            .collect()
    }

    /// Adds those of another, without loss.
    pub fn add(&mut self, other: &Self) {
        // Both have the same digits, and this one grows.
        self.0.add(&other.0).ok();
    }

    fn encoded(&self) -> Result<String, String> {
        let mut bytes = Vec::new();
        V2DeflateSerializer::new()
            .serialize(&self.0, &mut bytes)
            .map_err(|e| e.to_string())?;
        Ok(BASE64.encode(bytes))
    }

    /// What says how large it is is looked at first: the decoder believes it.
    fn decoded(text: &str) -> Result<Self, String> {
        let packed = BASE64
            .decode(text)
            .map_err(|e| format!("it is no base64: {e}"))?;
        let packed = packed.get(COMPRESSED_HEADER..).ok_or("it is too short")?;
        let mut bytes = Vec::new();
        ZlibDecoder::new(packed)
            .take((HEADER + MOST_BYTES + 1) as u64)
            .read_to_end(&mut bytes)
            .map_err(|e| format!("it cannot be expanded: {e}"))?;
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 4)?;
            Some(u32::from_be_bytes(bytes.try_into().ok()?))
        };
        let counts = bytes.len().checked_sub(HEADER).ok_or("it is too short")?;
        if counts > MOST_BYTES || word(4) != Some(counts as u32) {
            return Err("its length is not what it says".into());
        }
        if word(12) != Some(u32::from(DIGITS)) {
            return Err(format!("it does not have {DIGITS} digits"));
        }
        let read = HdrReader::new().deserialize::<u64, _>(&mut &bytes[..]);
        let mut histogram = read.map_err(|e| e.to_string())?;
        histogram.auto(true);
        Ok(Self(histogram))
    }
}

impl Serialize for Latencies {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut fields = to.serialize_struct("Latencies", 7)?;
        fields.serialize_field("count", &self.len())?;
        let percentiles = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p999", 99.9)];
        for (name, percent) in percentiles {
            fields.serialize_field(name, &self.percentile(percent))?;
        }
        fields.serialize_field("max", &self.max())?;
        let encoded = self.encoded().map_err(S::Error::custom)?;
        fields.serialize_field("hdr_base64", &encoded)?;
        fields.end()
    }
}

impl<'de> Deserialize<'de> for Latencies {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Encoded {
            hdr_base64: String,
        }
        let Encoded { hdr_base64 } = Encoded::deserialize(from)?;
        Self::decoded(&hdr_base64)
            .map_err(|e| serde::de::Error::custom(format!("a histogram cannot be read: {e}")))
    }
}

/// Lengths that are counted before they are recorded.
const COUNTED: usize = 16;

/// Latencies of which many are equally long, as those of a modelled device.
#[derive(Clone, Debug, Default)]
struct Repeated {
    /// By a hash: a length, and how many of it are not among the others.
    counted: [(u64, u64); COUNTED],
    others: Latencies,
}

impl Repeated {
    #[inline]
    fn record(&mut self, nanos: u64) {
        let place = (nanos.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize;
        let (length, count) = &mut self.counted[place];
        if *length != nanos {
            self.others.record(*length, *count);
            (*length, *count) = (nanos, 0);
        }
        *count += 1;
    }

    /// All of them.
    fn all(&self) -> Latencies {
        let mut all = self.others.clone();
        for &(length, count) in &self.counted {
            all.record(length, count);
        }
        all
    }
}

/// Latencies by what became of a request: issued at once, or left to the worker for some reason, its first.
#[derive(Clone, Debug, Default)]
pub struct LatencyClasses {
    mapped: Repeated,
    zero: Repeated,
    deferred: [Latencies; Reason::ALL.len()],
}

impl LatencyClasses {
    /// `is_zero` if it read what was never written.
    pub(super) fn record(&mut self, deferred: Option<Reason>, is_zero: bool, nanos: u64) {
        match deferred {
            None if is_zero => self.zero.record(nanos),
            None => self.mapped.record(nanos),
            Some(reason) => self.deferred[reason as usize].record(nanos, 1),
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.mapped.others.add(&other.mapped.all());
        self.zero.others.add(&other.zero.all());
        for (all, more) in self.deferred.iter_mut().zip(&other.deferred) {
            all.add(more);
        }
    }

    /// Those that there are, by name: `mapped`, `zero`, or that of the reason.
    pub fn by_name(&self) -> BTreeMap<String, Latencies> {
        let deferred = Reason::ALL.iter().map(|&reason| {
            let latencies = self.deferred[reason as usize].clone();
            (reason.to_string(), latencies)
        });
        let at_once = [(MAPPED, self.mapped.all()), (ZERO, self.zero.all())];
        at_once
            .map(|(name, latencies)| (name.into(), latencies))
            .into_iter()
            .chain(deferred)
            .filter(|(_, latencies)| !latencies.is_empty())
            .collect()
    }
}

/// The class of the requests that were issued at once.
pub(super) const MAPPED: &str = "mapped";
/// The class of those that read what was never written, and were answered at once.
pub(super) const ZERO: &str = "zero";

/// True if this is the class of requests that stayed on the fast path.
pub(super) fn is_fast(class: &str) -> bool {
    class == MAPPED || class == ZERO
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = u64>) -> Latencies {
        let mut latencies = Latencies::default();
        values
            .into_iter()
            .for_each(|value| latencies.record(value, 1));
        latencies
    }

    #[test]
    fn what_is_counted_first_is_not_lost() {
        for different in [1, 3, 1000] {
            let lengths = || (0..5000).map(move |n| n * n % different * 1000);
            let mut repeated = Repeated::default();
            lengths().for_each(|length| repeated.record(length));
            assert!(repeated.all() == of(lengths()));
        }
        assert!(Repeated::default().all().is_empty());
    }

    #[test]
    fn halves_add_up_to_the_whole_through_text() {
        let value = |n: u64| n * n * 977 % 5_000_000_000;
        let (mut first, second) = (of((0..4000).map(value)), of((4000..9000).map(value)));
        let second = Latencies::decoded(&second.encoded().unwrap()).unwrap();
        first.add(&second);
        assert!(first == of((0..9000).map(value)));
        let none = Latencies::decoded(&Latencies::default().encoded().unwrap()).unwrap();
        assert!(none.is_empty());
    }

    #[test]
    fn any_latency_comes_back() {
        let all = of([0, 1, 1000, u64::MAX / 3, u64::MAX]);
        let mut again = Latencies::decoded(&all.encoded().unwrap()).unwrap();
        assert!(again == all);
        again.add(&all);
        assert_eq!(again.len(), 10);
    }

    #[test]
    fn what_is_no_histogram_is_an_error() {
        let good = of([1, 2, 3]).encoded().unwrap();
        for bad in [
            "",
            "AAAA",
            "not base64!",
            &good[..good.len() - 8],
            &good[4..],
        ] {
            assert!(Latencies::decoded(bad).is_err(), "{bad}");
        }
        // Every byte of the expanded form wrong, the length of the counts among them: an error or another histogram, nothing else.
        let packed = BASE64.decode(&good).unwrap();
        let mut plain = Vec::new();
        ZlibDecoder::new(&packed[8..])
            .read_to_end(&mut plain)
            .unwrap();
        for at in 0..plain.len() {
            for value in [0, 0x7f, 0xff] {
                let mut bytes = plain.clone();
                bytes[at] = value;
                let mut again = packed[..8].to_vec();
                let level = flate2::Compression::fast();
                let mut zlib = flate2::read::ZlibEncoder::new(&bytes[..], level);
                zlib.read_to_end(&mut again).unwrap();
                if let Ok(latencies) = Latencies::decoded(&BASE64.encode(again)) {
                    latencies.percentile(99.0);
                    latencies.curve();
                }
            }
        }
    }
}
