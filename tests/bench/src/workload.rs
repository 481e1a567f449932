//! What is asked of the servers: a table of workloads by name.

use crate::back_end::Server;

/// What each request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It writes and flushes, one after the other; both count as one request.
    WriteFlush,
    /// It discards.
    Discard,
    /// Seven of ten read, the others write.
    Mixed,
}

/// Where requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Anywhere.
    Random,
    /// One behind the other, and from the beginning again.
    Sequential,
    /// To the beginning of each block in turn, until all have had one.
    OnceEachBlock,
}

/// What the image is before the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Disk {
    /// Written all over.
    Full,
    /// Never written; kept from round to round.
    Empty,
    /// Never written, made anew for each round.
    Fresh,
    /// Written all over again, by the server itself, before each round.
    Refilled,
    /// An empty child of an empty child of a full image; kept from round to round.
    Chain,
    /// The same, made anew for each round.
    FreshChain,
    /// The same, but the blocks of the empty child on top are the smallest that VDI has, and QCOW2's clusters are as large.
    FreshSmallChain,
}

/// How the client learns of answers, and who runs where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// It looks for them all the time and wants no calls.
    Polling,
    /// The same, but lets others have the CPU between: for more threads than CPUs.
    Yielding,
    /// It sleeps until it is called.
    Calls,
}

/// One load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) operation: Operation,
    pub(crate) order: Order,
    pub(crate) bytes: usize,
    /// Requests in flight in each queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    pub(crate) waiting: Waiting,
    pub(crate) disk: Disk,
}

impl Workload {
    /// Whether it ends when every block was visited.
    pub(crate) fn runs_out(&self) -> bool {
        self.order == Order::OnceEachBlock
    }

    /// Whether this server can do it: QEMU has no chains of VDI images, fio no discards of parts of files and no calls.
    pub(crate) fn suits(&self, server: Server) -> bool {
        match (self.disk, server) {
            (_, Server::VdiVhost | Server::Other) => true,
            (Disk::Chain | Disk::FreshChain | Disk::FreshSmallChain, Server::QsdQcow2) => true,
            (Disk::Refilled | Disk::FreshChain | Disk::FreshSmallChain, Server::Fio)
            | (_, Server::QsdQcow2) => false,
            (_, Server::Fio) => self.waiting != Waiting::Calls,
            (disk, Server::QsdVdi | Server::QsdVdiUring | Server::QsdRaw) => {
                !matches!(disk, Disk::Chain | Disk::FreshChain | Disk::FreshSmallChain)
            }
        }
    }

    /// The workload of this name.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|workload| workload.name == name)
    }

    /// Two queues, each with a thread of the client: nobody has a CPU of its own.
    const fn two_queues(self, name: &'static str) -> Self {
        let waiting = match self.waiting {
            Waiting::Calls => Waiting::Calls,
            Waiting::Polling | Waiting::Yielding => Waiting::Yielding,
        };
        Self {
            name,
            queues: 2,
            waiting,
            ..self
        }
    }

    const fn calls(self, name: &'static str) -> Self {
        Self {
            name,
            waiting: Waiting::Calls,
            ..self
        }
    }

    const fn on(self, disk: Disk) -> Self {
        Self { disk, ..self }
    }
}

const K4: usize = 4 << 10;
const K128: usize = 128 << 10;
const M1: usize = 1 << 20;

const fn load(
    name: &'static str,
    operation: Operation,
    order: Order,
    bytes: usize,
    depth: usize,
) -> Workload {
    Workload {
        name,
        operation,
        order,
        bytes,
        depth,
        queues: 1,
        waiting: Waiting::Polling,
        disk: Disk::Full,
    }
}

use Operation::{Discard, Mixed, Read, Write, WriteFlush};
use Order::{OnceEachBlock, Random, Sequential};

const READ_QD1: Workload = load("randread-4k-qd1", Read, Random, K4, 1);
const READ_QD32: Workload = load("randread-4k-qd32", Read, Random, K4, 32);
const WRITE_QD32: Workload = load("randwrite-4k-qd32", Write, Random, K4, 32);

/// All workloads, in the order of the table.
pub(crate) const ALL: &[Workload] = &[
    READ_QD1,
    READ_QD1.calls("randread-4k-qd1-calls"),
    READ_QD1.two_queues("randread-4k-qd1-2q"),
    READ_QD32,
    READ_QD32.calls("randread-4k-qd32-calls"),
    READ_QD32.two_queues("randread-4k-qd32-2q"),
    READ_QD32.calls("").two_queues("randread-4k-qd32-2q-calls"),
    WRITE_QD32,
    load("mixed-4k-qd32", Mixed, Random, K4, 32),
    load("seqread-128k-qd8", Read, Sequential, K128, 8),
    load("seqread-1m-qd8", Read, Sequential, M1, 8),
    load("seqwrite-128k-qd8", Write, Sequential, K128, 8),
    load("seqwrite-1m-qd8", Write, Sequential, M1, 8),
    load("allocwrite-4k-qd1", Write, OnceEachBlock, K4, 1).on(Disk::Fresh),
    load("allocwrite-4k-qd16", Write, OnceEachBlock, K4, 16).on(Disk::Fresh),
    load("allocwrite-1m-qd4", Write, OnceEachBlock, M1, 4).on(Disk::Fresh),
    load("zeroread-4k-qd32", Read, Random, K4, 32).on(Disk::Empty),
    load("writeflush-4k-qd1", WriteFlush, Random, K4, 1),
    load("discard-1m-qd4", Discard, OnceEachBlock, M1, 4).on(Disk::Refilled),
    load("chainread-4k-qd32", Read, Random, K4, 32).on(Disk::Chain),
    load("cow-4k-qd4", Write, OnceEachBlock, K4, 4).on(Disk::FreshChain),
    load("cow-4k-qd4-128k", Write, OnceEachBlock, K4, 4).on(Disk::FreshSmallChain),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_requests_fit_in_a_queue() {
        for (nth, workload) in ALL.iter().enumerate() {
            assert!(ALL[..nth].iter().all(|other| other.name != workload.name));
            assert!(workload.depth * 3 <= crate::client::QUEUE_SIZE.into());
            assert_eq!(workload.bytes % crate::contents::PAGE, 0);
        }
    }
}
