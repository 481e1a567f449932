//! What a disk must read as: what the format says of its images, and what was written since.

use std::collections::BTreeSet;
use std::ops::Range;

use vdi_core::{Disk, Sector};

use super::image_input::Input;
use super::reference::Reference;

/// What a disk must read as.
pub(super) struct Expected {
    pub(super) top: Reference,
    parent: Option<Reference>,
    /// The last one counts.
    pub(super) changes: Vec<(Range<u64>, Change)>,
}

/// What became of some sectors.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    /// With this byte.
    Filled(u8),
    /// They are zeros or what they were.
    Discarded,
}

impl Expected {
    pub(super) fn of(input: &Input, shape: &Reference) -> Self {
        Self {
            top: shape.clone(),
            parent: input.parent.clone().map(Reference::of),
            changes: Vec::new(),
        }
    }

    /// What a sector may read as.
    fn sector(&self, sector: u64) -> Vec<Vec<u8>> {
        let mut allowed = Vec::new();
        for (range, change) in self.changes.iter().rev() {
            match change {
                _ if !range.contains(&sector) => {}
                Change::Filled(byte) => {
                    allowed.push(vec![*byte; 512]);
                    return allowed;
                }
                Change::Discarded => allowed.push(vec![0; 512]),
            }
        }
        let own = self.top.sector(sector);
        let shown = || self.parent.as_ref()?.sector(sector);
        allowed.push(own.or_else(shown).unwrap_or_else(|| vec![0; 512]));
        allowed
    }

    /// The sectors that are worth a look.
    fn sectors(&self) -> BTreeSet<u64> {
        let mut sectors = self.top.sectors_held();
        sectors.extend(self.parent.iter().flat_map(Reference::sectors_held));
        sectors.extend([0, self.top.sectors().saturating_sub(1)]);
        for (range, _) in &self.changes {
            let around = range.start.saturating_sub(1)..range.end + 1;
            sectors.extend([around.start, around.end - 1]);
            sectors.extend(range.clone().take(9));
            sectors.extend(range.clone().rev().take(9));
        }
        sectors.retain(|&sector| sector < self.top.sectors());
        sectors
    }
}

/// Compares the sectors that are worth a look, and some more.
pub(super) fn assert_reads(disk: &Disk, expected: &Expected, more: &BTreeSet<u64>) {
    let mut found = vec![0; 512];
    for sector in expected.sectors().union(more).copied() {
        let range = disk
            .capacity()
            .range(Sector(sector), 1)
            .expect("it is on the disk");
        found.fill(0xEE);
        disk.read_at(range, &mut found)
            .expect("what opens lies in its file");
        let allowed = expected.sector(sector);
        assert!(
            allowed.contains(&found),
            "sector {sector} is {:?}, not {:?}; {:?}",
            &found[..4],
            allowed
                .iter()
                .map(|allowed| &allowed[..4])
                .collect::<Vec<_>>(),
            expected.changes
        );
    }
}
