//! Numbers that look random, from a seed that a failing test prints.
//!
//! Not for secrets. Source of the generator: SplitMix64, Steele, Lea, Flood, "Fast splittable pseudorandom
//! number generators", 2014.

use std::ops::Range;

/// A generator.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator that always gives the same numbers.
    #[must_use]
    pub const fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    /// A generator whose seed is the time; it is printed, so that a failing test shows it.
    #[must_use]
    pub fn printed() -> Self {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
        let since = now.expect("the clock is past 1970").as_micros();
        let seed = u64::try_from(since).expect("until the year 586524");
        println!("the seed is {seed}");
        Self(seed)
    }

    /// Another generator, for another thread.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self(self.number())
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number of a range that is not empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.number() % (range.end - range.start)
    }

    /// One of several things.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let nth = self.within(0..of.len() as u64);
        &of[usize::try_from(nth).expect("64-bit hosts only")]
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.next_multiple_of(8)];
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}
