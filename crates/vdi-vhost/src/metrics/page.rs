//! The page: every metric, by the names that Prometheus' conventions want. `docs/fleet.md` lists them.

use std::fmt::{self, Debug};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, MetricEncoder,
    NoLabelSet, prometheus_text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::fleet::Fleet;
use crate::request::Kind;
use crate::stats::{KindSnapshot, StatsSnapshot, Usage};

/// Buckets of the histograms with an upper bound: from 4 µs in powers of two to 4.2 s. There are more in `stats`; each is a line for each
/// kind of each disk here.
const BOUNDS: usize = 21;

/// The bound of the first.
const FIRST_US: u64 = 4;

/// What is seen of a disk.
#[derive(Debug)]
pub(super) struct Seen {
    name: String,
    is_connected: bool,
    usage: Usage,
    stats: StatsSnapshot,
}

impl Seen {
    /// All disks as they are now, by name.
    pub(super) fn all(fleet: &Fleet) -> Vec<Self> {
        let all = fleet.list().into_iter();
        all.map(|berth| Self {
            name: berth.name().to_owned(),
            is_connected: berth.is_connected(),
            usage: berth.usage(),
            stats: berth.stats(),
        })
        .collect()
    }
}

/// The text of the page.
pub(super) fn page(disks: Vec<Seen>) -> String {
    let mut registry = Registry::with_prefix("vdi_vhost");
    registry.register_collector(Box::new(Page { disks }));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry).expect("a string takes everything");
    text
}

#[derive(Debug)]
struct Page {
    disks: Vec<Seen>,
}

impl Collector for Page {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        let help = "The version of this program, as a label.";
        to.encode_descriptor("build_info", help, None, MetricType::Gauge)?
            .encode_family(&version)?
            .encode_gauge(&1_u64)?;
        let help = "Disks that are served.";
        to.encode_descriptor("disks", help, None, MetricType::Gauge)?
            .encode_gauge(&(self.disks.len() as u64))?;
        self.requests(&mut to)?;
        self.waiting(&mut to)?;
        self.syncs(&mut to)?;
        self.images(&mut to)
    }
}

impl Page {
    fn requests(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        self.by_kind(
            to,
            "requests",
            "Requests that were answered, with whatever status.",
            |kind| kind.requests,
        )?;
        self.by_kind(
            to,
            "request_errors",
            "Requests that were not answered with OK.",
            |kind| kind.errors,
        )?;
        self.by_kind(
            to,
            "request_bytes",
            "Bytes that requests answered with OK read, wrote or made zeros.",
            |kind| kind.bytes,
        )?;
        let help = "Time from when a request was taken until the guest had its answer. A kind is here once there was such a request.";
        let (name, kind) = ("request_duration_seconds", MetricType::Histogram);
        self.family(to, name, help, kind, |family, disk| {
            let known = disk.stats.kinds().into_iter();
            let mut known = known.filter(|(_, of)| of.requests > 0);
            known.try_for_each(|(kind, of)| {
                histogram(&mut family.encode_family(&of_kind(disk, kind))?, of)
            })
        })?;
        self.counter(
            to,
            "refused_requests",
            "Chains that were answered and are no requests that the disk has.",
            |disk| disk.stats.refused_requests,
        )?;
        self.counter(
            to,
            "failed_requests",
            "Requests that the host failed.",
            |disk| disk.usage.failed_requests,
        )?;
        self.counter(
            to,
            "restarted_requests",
            "Requests that an earlier daemon left in flight and that were started again.",
            |disk| disk.stats.restarted_requests,
        )
    }

    fn waiting(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        self.gauge(
            to,
            "in_flight_requests",
            "Requests that were taken and are not answered.",
            |disk| disk.stats.in_flight_requests,
        )?;
        self.counter(
            to,
            "throttled_requests",
            "Requests that limits kept waiting.",
            |disk| disk.stats.throttled_requests,
        )?;
        self.counter(
            to,
            "throttled_seconds",
            "How long limits kept requests waiting, added up over the threads that serve the disk.",
            |disk| seconds(disk.stats.throttled_us),
        )
    }

    fn syncs(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        self.counter(
            to,
            "syncs",
            "Syncs of the image that requests waited for.",
            |disk| disk.stats.syncs,
        )?;
        self.counter(
            to,
            "failed_syncs",
            "Syncs of the image that failed.",
            |disk| disk.stats.failed_syncs,
        )?;
        self.counter(
            to,
            "sync_seconds",
            "How long syncs of the image took together.",
            |disk| seconds(disk.stats.syncs_us),
        )
    }

    fn images(&self, to: &mut DescriptorEncoder<'_>) -> fmt::Result {
        self.gauge(
            to,
            "disk_size_bytes",
            "The size that the guest sees.",
            |disk| disk.usage.size_bytes,
        )?;
        self.gauge(
            to,
            "allocated_blocks",
            "Blocks of the disk with storage in the top image.",
            |disk| disk.usage.allocated_blocks,
        )?;
        self.gauge(to, "allocated_bytes", "The same in bytes.", |disk| {
            disk.usage.allocated_blocks * disk.usage.block_bytes
        })?;
        self.gauge(
            to,
            "image_file_bytes",
            "Length of the top image's file.",
            |disk| disk.usage.file_bytes,
        )?;
        self.counter(
            to,
            "released_blocks",
            "Blocks whose storage was given back.",
            |disk| disk.usage.released_blocks,
        )?;
        self.gauge(
            to,
            "front_end_connected",
            "Whether a front end is there.",
            |disk| u64::from(disk.is_connected),
        )?;
        self.gauge(
            to,
            "disk_failed",
            "Whether a failure ended all writing until the daemon is started again.",
            |disk| u64::from(disk.usage.failed),
        )
    }

    /// A counter for each kind of request of each disk.
    fn by_kind(
        &self,
        to: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        of: impl Fn(&KindSnapshot) -> u64,
    ) -> fmt::Result {
        self.family(to, name, help, MetricType::Counter, |family, disk| {
            let mut kinds = disk.stats.kinds().into_iter();
            kinds
                .try_for_each(|(kind, snapshot)| count(family, &of_kind(disk, kind), &of(snapshot)))
        })
    }

    fn counter<N: EncodeCounterValue>(
        &self,
        to: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        of: impl Fn(&Seen) -> N,
    ) -> fmt::Result {
        self.family(to, name, help, MetricType::Counter, |family, disk| {
            count(family, &of_disk(disk), &of(disk))
        })
    }

    fn gauge<N: EncodeGaugeValue>(
        &self,
        to: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        of: impl Fn(&Seen) -> N,
    ) -> fmt::Result {
        self.family(to, name, help, MetricType::Gauge, |family, disk| {
            family
                .encode_family(&of_disk(disk))?
                .encode_gauge(&of(disk))
        })
    }

    /// What `each` makes of each disk, under one name.
    fn family(
        &self,
        to: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        kind: MetricType,
        mut each: impl FnMut(&mut MetricEncoder<'_>, &Seen) -> fmt::Result,
    ) -> fmt::Result {
        let mut family = to.encode_descriptor(name, help, None, kind)?;
        self.disks
            .iter()
            .try_for_each(|disk| each(&mut family, disk))
    }
}

/// The label of a disk.
fn of_disk(disk: &Seen) -> [(&'static str, &str); 1] {
    [("disk", &disk.name)]
}

/// The labels of a disk's requests of a kind.
fn of_kind(disk: &Seen, kind: Kind) -> [(&'static str, &str); 2] {
    [("disk", &disk.name), ("kind", label(kind))]
}

/// One counter of a family.
fn count(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    value: &impl EncodeCounterValue,
) -> fmt::Result {
    family
        .encode_family(labels)?
        .encode_counter::<NoLabelSet, _, u64>(value, None)
}

fn histogram(to: &mut MetricEncoder<'_>, kind: &KindSnapshot) -> fmt::Result {
    let bound_us = |nth: usize| FIRST_US << nth;
    let mut buckets = [(f64::INFINITY, 0); BOUNDS + 1];
    for (nth, bucket) in buckets[..BOUNDS].iter_mut().enumerate() {
        bucket.0 = seconds(bound_us(nth));
    }
    for found in &kind.latencies {
        let fits = |nth: &usize| found.at_most_us.is_some_and(|us| us <= bound_us(*nth));
        let nth = (0..BOUNDS).find(fits).unwrap_or(BOUNDS);
        buckets[nth].1 += found.requests;
    }
    let sum = seconds(kind.latency_us);
    to.encode_histogram::<NoLabelSet>(sum, kind.requests, &buckets, None)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a float has microseconds for 285 years"
)]
fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

const fn label(kind: Kind) -> &'static str {
    match kind {
        Kind::Read => "read",
        Kind::Write => "write",
        Kind::Flush => "flush",
        Kind::Discard => "discard",
        Kind::WriteZeroes => "write_zeroes",
        Kind::GetId => "get_id",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Bucket;

    #[test]
    fn latencies_are_in_the_bucket_that_holds_theirs_and_all_are_counted() {
        let bucket = |at_most_us, requests| Bucket {
            at_most_us,
            requests,
        };
        let read = KindSnapshot {
            requests: 7,
            latency_us: 1_500_000,
            latencies: vec![
                bucket(Some(1), 1),
                bucket(Some(4), 1),
                bucket(Some(6), 2),
                bucket(Some(6_291_456), 1),
                bucket(None, 2),
            ],
            ..KindSnapshot::default()
        };
        let seen = Seen {
            name: "a".to_owned(),
            is_connected: true,
            usage: Usage::default(),
            stats: StatsSnapshot {
                read,
                ..StatsSnapshot::default()
            },
        };
        let text = page(vec![seen]);
        let name = "vdi_vhost_request_duration_seconds";
        for line in [
            "_bucket{disk=\"a\",kind=\"read\",le=\"4e-06\"} 2",
            "_bucket{disk=\"a\",kind=\"read\",le=\"8e-06\"} 4",
            "_bucket{disk=\"a\",kind=\"read\",le=\"4.194304\"} 4",
            "_bucket{disk=\"a\",kind=\"read\",le=\"+Inf\"} 7",
            "_sum{disk=\"a\",kind=\"read\"} 1.5",
            "_count{disk=\"a\",kind=\"read\"} 7",
        ] {
            assert!(text.contains(&format!("{name}{line}\n")), "{line}\n{text}");
        }
        assert!(text.contains("\nvdi_vhost_front_end_connected{disk=\"a\"} 1\n"));
        // A kind that there was no request of takes no lines.
        assert!(!text.contains("seconds_count{disk=\"a\",kind=\"write\"}"));
    }
}
