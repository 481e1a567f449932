//! What is a chain but no request: it comes back with IOERR or UNSUPP, and nothing else happens.

use vdi_tests::driver::{Descriptor, UNTOUCHED};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use crate::bench::{Bench, HOLE, NOWHERE, readable, writable};

/// The data of both kinds of requests at a place, with the request's type.
fn both_ways(at: u64, len_bytes: u32) -> [(u32, Descriptor); 2] {
    [
        (VIRTIO_BLK_T_IN, writable(at, len_bytes)),
        (VIRTIO_BLK_T_OUT, readable(at, len_bytes)),
    ]
}

#[test]
fn data_outside_guest_memory_is_an_io_error() {
    let mut bench = Bench::new();
    let places = [
        (NOWHERE, 512),
        (HOLE, 512),
        (HOLE - 512, 1024),
        (HOLE - 1, 512),
        (2 * HOLE - 512, 1024),
        (u64::MAX - 511, 512),
        (u64::MAX - 255, 512),
        (u64::MAX, 512),
        (0, 1 << 31),
        (0, u32::MAX - 511),
    ];
    for (at, len_bytes) in places {
        for (kind, data) in both_ways(at, len_bytes) {
            bench.set_header(kind, 2048);
            let chain = [bench.header(), data, bench.status()];
            bench.expect_io_error(&chain);
        }
    }
    bench.expect_good_end();
}

#[test]
fn good_data_before_bad_data_is_not_touched() {
    let mut bench = Bench::new();
    for (kind, bad) in both_ways(NOWHERE, 512) {
        bench.set_header(kind, 2048);
        let good = Descriptor {
            flags: bad.flags,
            ..bench.data(512)
        };
        for data in [[good, bad], [bad, good]] {
            let chain = [bench.header(), data[0], data[1], bench.status()];
            bench.expect_io_error(&chain);
        }
    }
    bench.expect_good_end();
}

#[test]
fn lengths_that_add_up_beyond_32_bits_are_an_io_error() {
    let mut bench = Bench::new();
    for (kind, data) in both_ways(0, 48 << 20) {
        bench.set_header(kind, 0);
        let mut chain = vec![bench.header()];
        chain.extend([data; 60]);
        chain.push(bench.status());
        // Two of them would wrap to a length that fits the disk.
        bench.expect_io_error(&chain);
        let wrapping = Descriptor {
            len_bytes: 1 << 31,
            ..data
        };
        let chain = [
            bench.header(),
            wrapping,
            wrapping,
            Descriptor {
                len_bytes: 512,
                ..data
            },
            bench.status(),
        ];
        bench.expect_io_error(&chain);
    }
    bench.expect_good_end();
}

#[test]
fn data_that_are_no_number_of_sectors_are_an_io_error() {
    let mut bench = Bench::new();
    for len_bytes in [1, 511, 513, 1023, 4095] {
        for (kind, data) in both_ways(bench.data.at(), len_bytes) {
            bench.set_header(kind, 2048);
            let chain = [bench.header(), data, bench.status()];
            bench.expect_io_error(&chain);
        }
    }
    bench.expect_good_end();
}

#[test]
fn sectors_beyond_the_disk_are_an_io_error_however_they_overflow() {
    let mut bench = Bench::new();
    let sectors = 64 << 11;
    for sector in [
        sectors,
        sectors - 1,
        1 << 32,
        1 << 55,
        (1 << 55) - 1,
        u64::MAX / 512,
        1 << 63,
        u64::MAX,
    ] {
        for (kind, data) in both_ways(bench.data.at(), 1024) {
            bench.set_header(kind, sector);
            let chain = [bench.header(), data, bench.status()];
            bench.expect_io_error(&chain);
        }
    }
    bench.expect_good_end();
}

#[test]
fn a_header_that_is_too_short_is_an_io_error() {
    let mut bench = Bench::new();
    for len_bytes in [1, 4, 8, 15] {
        let header = readable(bench.header.at(), len_bytes);
        let chain = [header, bench.data(512), bench.status()];
        bench.expect_io_error(&chain);
    }
    let pieces = [
        readable(bench.header.at(), 8),
        readable(bench.header.at() + 8, 7),
    ];
    let chain = [pieces[0], pieces[1], bench.data(512), bench.status()];
    bench.expect_io_error(&chain);
    let none = [bench.data(512), bench.status()];
    bench.expect_io_error(&none);
    let only_status = [bench.status()];
    bench.expect_io_error(&only_status);
    bench.expect_good_end();
}

#[test]
fn a_header_outside_guest_memory_is_an_io_error() {
    let mut bench = Bench::new();
    for at in [NOWHERE, HOLE, HOLE - 8, u64::MAX - 7] {
        let chain = [readable(at, 16), bench.data(512), bench.status()];
        bench.expect_io_error(&chain);
    }
    bench.expect_good_end();
}

#[test]
fn readable_after_writable_is_an_io_error() {
    let mut bench = Bench::new();
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH] {
        bench.set_header(kind, 2048);
        let data = Descriptor {
            flags: 0,
            ..bench.data(512)
        };
        let status = bench.status();
        let between = writable(bench.status.at() + 8, 1);
        let chain = [bench.header(), between, data, status];
        bench.expect_io_error(&chain);
        let chain = [between, bench.header(), status];
        bench.expect_io_error(&chain);
    }
    bench.expect_good_end();
}

#[test]
fn an_unknown_type_is_unsupported_whatever_its_data() {
    let mut bench = Bench::new();
    for kind in [2, 3, 7, 9, 10, 12, 15, 99, u32::MAX] {
        bench.set_header(kind, u64::MAX);
        let read = Descriptor {
            flags: 0,
            ..bench.data(513)
        };
        for chain in [
            vec![bench.header(), bench.status()],
            vec![bench.header(), bench.data(513), bench.status()],
            vec![bench.header(), read, bench.status()],
            vec![bench.header(), readable(NOWHERE, 512), bench.status()],
        ] {
            let status = u32::from(bench.status_of(&chain));
            assert!(
                [VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_S_IOERR].contains(&status),
                "type {kind}: {status}"
            );
            assert!(
                chain.len() > 2 || status == VIRTIO_BLK_S_UNSUPP,
                "type {kind}"
            );
            assert!(bench.data.read(65536) == [UNTOUCHED; 65536]);
        }
    }
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn data_that_a_request_has_no_use_for_are_not_touched() {
    let mut bench = Bench::new();
    for kind in [VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_OUT] {
        bench.set_header(kind, 0);
        let chain = [bench.header(), bench.data(4096), bench.status()];
        assert_ne!(bench.status_of(&chain), UNTOUCHED);
        assert!(bench.data.read(65536) == [UNTOUCHED; 65536]);
        bench.expect_service();
    }
    for kind in [VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_GET_ID] {
        bench.set_header(kind, 0);
        let read = Descriptor {
            flags: 0,
            ..bench.data(4096)
        };
        let chain = [bench.header(), read, bench.status()];
        assert_ne!(bench.status_of(&chain), UNTOUCHED);
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn get_id_writes_20_bytes_at_most_whatever_the_buffer() {
    let mut bench = Bench::with(&["--serial", "12345678901234567890"]);
    bench.set_header(VIRTIO_BLK_T_GET_ID, 77);
    for len_bytes in [1, 19, 20, 21, 512, 65536] {
        let chain = [bench.header(), bench.data(len_bytes), bench.status()];
        let status = bench.status_of(&chain);
        assert_ne!(status, UNTOUCHED, "{len_bytes}");
        let data = bench.data.read(65536);
        let written = len_bytes.min(20) as usize;
        assert!(
            data[written..]
                .iter()
                .all(|&byte| [0, UNTOUCHED].contains(&byte)),
            "{len_bytes}"
        );
        assert!(
            data[len_bytes as usize..]
                .iter()
                .all(|&byte| byte == UNTOUCHED),
            "{len_bytes}"
        );
        assert!(
            len_bytes < 20 || data[..20] == *b"12345678901234567890",
            "{len_bytes}"
        );
    }
    bench.expect_good_end();
}

#[test]
fn a_status_that_lies_on_the_ring_or_on_the_header_does_no_harm() {
    let mut bench = Bench::new();
    let [table, available, used] = bench.driver.queues[0].ring().addresses();
    for at in [
        bench.header.at(),
        table + 16 * 127,
        available + 200,
        used + 1000,
    ] {
        let chain = [bench.header(), writable(at, 1)];
        let linked = crate::bench::linked(&chain);
        let _fate = bench.expect_survival(&linked);
    }
    bench.expect_good_end();
}
