//! How a request is cut into descriptors. A device must accept every way (virtio 1.2 section 2.7.4).
//!
//! Not what a request says: see `queue.rs`. All layouts here are legal.

/// How the bytes of one direction are cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// Header and status have descriptors of their own, data have one.
    Framed,
    /// One descriptor: the header shares it with data, the status too.
    Whole,
    /// Pieces of these sizes, then one of what is left.
    Sizes(Vec<u32>),
    /// Framed, with the data in pieces of this size.
    DataEvery(u32),
    /// Everything in pieces of this size.
    Every(u32),
}

/// Which descriptors lie in an indirect table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Indirect {
    /// None.
    No,
    /// All but the first so many.
    After(usize),
}

/// A way to cut a request into descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// What the device reads: header and data.
    pub readable: Cut,
    /// What the device writes: data and status.
    pub writable: Cut,
    /// Whether an empty descriptor follows each descriptor.
    pub empty_between: bool,
    /// What lies in an indirect table.
    pub indirect: Indirect,
    /// Whether the descriptor of the indirect table has the WRITE flag, which means nothing there.
    pub writable_table: bool,
    /// How far behind a multiple of 512 each piece of memory begins.
    pub misaligned_by: u64,
    /// Where the largest piece lies, if not anywhere.
    pub largest_at: Option<u64>,
}

impl Layout {
    /// Header, data, status: what Linux does without indirect descriptors.
    #[must_use]
    pub const fn framed() -> Self {
        Self {
            readable: Cut::Framed,
            writable: Cut::Framed,
            empty_between: false,
            indirect: Indirect::No,
            writable_table: false,
            misaligned_by: 0,
            largest_at: None,
        }
    }

    /// One descriptor for each direction.
    #[must_use]
    pub fn whole() -> Self {
        Self::cut(Cut::Whole, Cut::Whole)
    }

    /// Data in pieces of `len_bytes`.
    #[must_use]
    pub fn data_every(len_bytes: u32) -> Self {
        Self::cut(Cut::DataEvery(len_bytes), Cut::DataEvery(len_bytes))
    }

    /// Any cut of either direction.
    #[must_use]
    pub fn cut(readable: Cut, writable: Cut) -> Self {
        Self {
            readable,
            writable,
            ..Self::framed()
        }
    }

    /// The same, in an indirect table.
    #[must_use]
    pub fn indirect(self) -> Self {
        self.indirect_after(0)
    }

    /// The same, with an indirect table behind the first `count` descriptors.
    #[must_use]
    pub fn indirect_after(mut self, count: usize) -> Self {
        self.indirect = Indirect::After(count);
        self
    }

    /// The same, with the WRITE flag on the table's descriptor.
    #[must_use]
    pub fn writable_table(mut self) -> Self {
        self.writable_table = true;
        self
    }

    /// The same, with an empty descriptor behind each.
    #[must_use]
    pub fn empty_between(mut self) -> Self {
        self.empty_between = true;
        self
    }

    /// The same, with memory that begins `by` bytes behind a multiple of 512.
    #[must_use]
    pub fn misaligned(mut self, by: u64) -> Self {
        self.misaligned_by = by;
        self
    }

    /// The same, with the largest piece at a given guest address.
    #[must_use]
    pub fn largest_at(mut self, at: u64) -> Self {
        self.largest_at = Some(at);
        self
    }

    /// Sizes of the readable pieces of a request whose header is `header` bytes long.
    #[must_use]
    pub fn readable_sizes(&self, header: u32, data: u32) -> Vec<u32> {
        match &self.readable {
            Cut::Framed => sizes([header, data]),
            Cut::DataEvery(len) => sizes([header].into_iter().chain(every(data, *len))),
            other @ (Cut::Whole | Cut::Sizes(_) | Cut::Every(_)) => other.of_whole(header + data),
        }
    }

    /// Sizes of the writable pieces of a request whose status is `status` bytes long.
    #[must_use]
    pub fn writable_sizes(&self, data: u32, status: u32) -> Vec<u32> {
        match &self.writable {
            Cut::Framed => sizes([data, status]),
            Cut::DataEvery(len) => sizes(every(data, *len).into_iter().chain([status])),
            other @ (Cut::Whole | Cut::Sizes(_) | Cut::Every(_)) => other.of_whole(data + status),
        }
    }

    /// Layouts of every kind, for requests with at least 1 KiB and at most 8 KiB of data.
    #[must_use]
    pub fn all_kinds() -> Vec<(&'static str, Self)> {
        vec![
            ("framed", Self::framed()),
            ("one descriptor each way", Self::whole()),
            ("data in sectors", Self::data_every(512)),
            (
                "header in bytes",
                Self::cut(Cut::Sizes(vec![1; 16]), Cut::Framed),
            ),
            (
                "header in pieces, the last with data",
                Self::cut(Cut::Sizes(vec![3, 5, 7, 101]), Cut::Framed),
            ),
            ("header with data", Self::cut(Cut::Whole, Cut::Framed)),
            ("status with data", Self::cut(Cut::Framed, Cut::Whole)),
            (
                "status with the last byte of data",
                Self::cut(Cut::Framed, Cut::Sizes(vec![1023])),
            ),
            (
                "everything in odd pieces",
                Self::cut(Cut::Every(333), Cut::Every(335)),
            ),
            ("empty descriptors", Self::data_every(1024).empty_between()),
            ("indirect", Self::framed().indirect()),
            (
                "indirect, odd pieces",
                Self::cut(Cut::Every(333), Cut::Every(335)).indirect(),
            ),
            (
                "indirect after the header",
                Self::data_every(512).indirect_after(1),
            ),
            (
                "indirect after header and data",
                Self::data_every(512).indirect_after(2).writable_table(),
            ),
            ("misaligned memory", Self::framed().misaligned(1)),
            (
                "misaligned memory in odd pieces",
                Self::cut(Cut::Every(333), Cut::Every(335)).misaligned(7),
            ),
        ]
    }
}

impl Cut {
    fn of_whole(&self, total: u32) -> Vec<u32> {
        match self {
            Self::Whole | Self::Framed | Self::DataEvery(_) => sizes([total]),
            Self::Every(len) => every(total, *len),
            Self::Sizes(first) => {
                let mut left = total;
                let mut all = Vec::new();
                for &size in first {
                    all.push(size.min(left));
                    left -= size.min(left);
                }
                all.push(left);
                sizes(all)
            }
        }
    }
}

fn sizes(all: impl IntoIterator<Item = u32>) -> Vec<u32> {
    all.into_iter().filter(|&size| size > 0).collect()
}

fn every(total: u32, len: u32) -> Vec<u32> {
    let mut all = vec![len; (total / len) as usize];
    all.push(total % len);
    sizes(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_covers_every_byte_once() {
        for (name, layout) in Layout::all_kinds() {
            let out: u32 = layout.readable_sizes(16, 4096).iter().sum();
            let back: u32 = layout.writable_sizes(4096, 1).iter().sum();
            assert_eq!((out, back), (4112, 4097), "{name}");
        }
    }

    #[test]
    fn sizes_beyond_the_end_are_cut() {
        let layout = Layout::cut(Cut::Sizes(vec![3, 5, 7, 101]), Cut::Framed);
        assert_eq!(layout.readable_sizes(16, 0), [3, 5, 7, 1]);
    }
}
