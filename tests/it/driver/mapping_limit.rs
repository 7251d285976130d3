//! What happens when the system allows no more mappings.
//!
//! The limit is the process's, so the test has a process of its own.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]
#![cfg(target_os = "linux")]

use crate::support::process;
use std::fs::File;
use std::io::Read;

use crate::support::driver::{read, refusal, write};
use kitsune::driver::host::PAGE_GRANULARITY as PAGE;
use kitsune::{Device, HostConfig};

const ENOMEM: i32 = 12;

/// How many mappings of pages the system knows, without making one for the answer.
fn shown(maps: &mut String) -> usize {
    maps.clear();
    let mut file = File::open("/proc/self/maps").unwrap();
    file.read_to_string(maps).unwrap();
    maps.lines().filter(|line| line.contains(" rw-s ")).count()
}

#[test]
fn a_refusal_by_the_system_loses_nothing() {
    process::alone(
        process::test_name!("a_refusal_by_the_system_loses_nothing"),
        || {
            let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
            let limit: u64 = limit.trim().parse().unwrap();
            if limit > 200_000 {
                eprintln!("passed over: {limit} mappings are more than this test wants to make");
                return;
            }
            let device = Device::host(HostConfig::default()).unwrap();
            let driver = device.driver();
            let stream = device.create_stream().unwrap();
            // The same page everywhere: no mapping continues the one before it, so the system cannot merge any.
            let page = driver.create_page(PAGE).unwrap();
            let bytes = limit * PAGE;
            let range = driver.reserve(bytes).unwrap();
            driver.map(range, &[page]).unwrap();
            // This also starts the thread of the stream, which needs mappings of its own.
            write(&stream, range, &[1]);
            stream.synchronize().unwrap();

            // Taken now, while the allocator of this program still gets what it asks for.
            let mut maps = String::with_capacity(32 << 20);
            let mut mapped = 1;
            let refused = loop {
                assert!(mapped < limit, "the system knows no limit");
                match driver.map(range.offset(mapped * PAGE), &[page]) {
                    Ok(()) => mapped += 1,
                    refused => break refused,
                }
            };
            let (call, code, _) = refusal(refused);
            // Refused in the middle of a call: what it had mapped is gone again.
            mapped -= 6;
            // SAFETY: the stream has run dry.
            unsafe { driver.unmap(range.offset(mapped * PAGE), 6 * PAGE) }.unwrap();
            let before = shown(&mut maps);
            let several = driver.map(range.offset(mapped * PAGE), &[page; 20]);
            let rolled_back = (refusal(several).1, shown(&mut maps) - before);
            let (free, last) = (
                driver.memory_info().unwrap().free,
                range.offset((mapped - 1) * PAGE),
            );
            let outcome = (call, code, free, read(&stream, last, 1));
            // Only now: a failing assertion needs mappings, too.
            // SAFETY: the stream has run dry.
            unsafe { driver.unmap(range, mapped * PAGE) }.unwrap();
            let total = device.properties().total_memory;
            assert_eq!(rolled_back, (ENOMEM, 0));
            assert_eq!(outcome, ("map", ENOMEM, total - PAGE, vec![1]));

            // What was refused can be done after all.
            driver.map(range.offset(mapped * PAGE), &[page]).unwrap();
            assert_eq!(read(&stream, range.offset(mapped * PAGE), 1), [1]);
            // SAFETY: the stream has run dry.
            unsafe { driver.unmap(range, bytes) }.unwrap();
            driver.release(range, bytes).unwrap();
            driver.destroy_page(page).unwrap();
            assert_eq!(device.memory_info().unwrap().free, total);
        },
    );
}
