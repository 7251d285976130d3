//! Pages and addresses of the host device.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]
#![cfg(target_os = "linux")]

use std::fs::read_to_string;
use std::sync::mpsc::channel;
use std::thread::yield_now;

use crate::support::driver::{Gate, act, allocate, copy, fill, read, refusal, threads, write};
use kitsune::driver::host::PAGE_GRANULARITY as PAGE;
use kitsune::driver::{DevicePtr, PageHandle};
use kitsune::units::GIB;
use kitsune::{Device, HostConfig, Result};

const ENOMEM: i32 = 12;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;
const ENOTSUP: i32 = 95;

fn unmap(device: &Device, ptr: DevicePtr, bytes: u64) -> Result<()> {
    // SAFETY: the tests synchronize before they unmap.
    unsafe { device.driver().unmap(ptr, bytes) }
}

fn with_capacity(capacity: u64) -> Device {
    Device::host(HostConfig {
        capacity,
        ..HostConfig::default()
    })
    .unwrap()
}

/// Lines of the process's list of mappings that belong to the page file of `platform` and can be read.
fn mappings_of(platform: u64) -> usize {
    let name = format!("/memfd:kitsune-{platform}-0 ");
    let maps = read_to_string("/proc/self/maps").unwrap();
    let mine = maps.lines().filter(|line| line.contains(&name));
    mine.filter(|line| line.contains(" rw-s ")).count()
}

#[test]
fn a_page_shows_the_same_bytes_at_every_address() {
    let device = threads();
    let driver = device.driver();
    assert!(device.properties().virtual_memory);
    assert_eq!(device.properties().page_granularity, 2 << 20);
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(8 * PAGE).unwrap();
    assert!(range.0.is_multiple_of(PAGE));
    let page = driver.create_page(2 * PAGE).unwrap();
    let (one, two) = (range.offset(PAGE), range.offset(5 * PAGE));
    driver.map(one, &[page]).unwrap();
    driver.map(two, &[page]).unwrap();
    write(&stream, one.offset(PAGE - 2), &[1, 2, 3, 4]);
    assert_eq!(read(&stream, two.offset(PAGE - 2), 4), [1, 2, 3, 4]);
    fill(&stream, two.offset(PAGE), 9, 1);
    assert_eq!(read(&stream, one.offset(PAGE - 2), 4), [1, 2, 9, 4]);

    // One mapping gone, handle gone: the other mapping keeps the bytes.
    unmap(&device, one, 2 * PAGE).unwrap();
    driver.destroy_page(page).unwrap();
    assert_eq!(read(&stream, two.offset(PAGE - 2), 4), [1, 2, 9, 4]);
    assert_eq!(device.memory_info().unwrap().free, 80 * GIB - 2 * PAGE);
    unmap(&device, two, 2 * PAGE).unwrap();
    assert_eq!(device.memory_info().unwrap().free, 80 * GIB);
    driver.release(range, 8 * PAGE).unwrap();
}

#[test]
fn different_pages_hold_different_bytes() {
    let device = threads();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(64 * PAGE).unwrap();
    let pages: Vec<PageHandle> = (0..64).map(|_| driver.create_page(PAGE).unwrap()).collect();
    for (index, page) in (0..).zip(&pages) {
        driver.map(range.offset(index * PAGE), &[*page]).unwrap();
    }
    assert_eq!(
        mappings_of(driver.platform()),
        1,
        "neighbors are one mapping of the system"
    );
    for index in 0..64 {
        fill(
            &stream,
            range.offset(index * PAGE),
            u8::try_from(index).unwrap(),
            PAGE,
        );
    }
    // Every second page goes, and comes back elsewhere as a new one.
    stream.synchronize().unwrap();
    for index in (0..64).step_by(2) {
        unmap(&device, range.offset(index * PAGE), PAGE).unwrap();
        driver
            .destroy_page(pages[usize::try_from(index).unwrap()])
            .unwrap();
    }
    for index in (0..64).step_by(2) {
        let page = driver.create_page(PAGE).unwrap();
        driver.map(range.offset(index * PAGE), &[page]).unwrap();
        fill(&stream, range.offset(index * PAGE), 200, PAGE);
    }
    for index in (1..64).step_by(2) {
        let at = range.offset(index * PAGE);
        let expected = u8::try_from(index).unwrap();
        assert_eq!(
            [read(&stream, at, 1), read(&stream, at.offset(PAGE - 1), 1)],
            [[expected]; 2]
        );
    }
    stream.synchronize().unwrap();
    unmap(&device, range, 64 * PAGE).unwrap();
    assert_eq!(mappings_of(driver.platform()), 0);
    driver.release(range, 64 * PAGE).unwrap();
}

#[test]
fn pages_are_mapped_side_by_side_or_not_at_all() {
    let device = threads();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(8 * PAGE).unwrap();
    let [one, two, three] = [1, 2, 1].map(|pages| driver.create_page(pages * PAGE).unwrap());
    driver.map(range, &[]).unwrap();
    // In the order of the file, out of it, and one of them twice.
    driver.map(range, &[one, two]).unwrap();
    driver
        .map(range.offset(3 * PAGE), &[three, one, three])
        .unwrap();
    for (index, value) in [(0, 1), (1, 2), (2, 3), (3, 4)] {
        fill(&stream, range.offset(index * PAGE), value, PAGE);
    }
    let seen: Vec<u8> = (0..6)
        .map(|index| read(&stream, range.offset(index * PAGE + 7), 1)[0])
        .collect();
    assert_eq!(seen, [1, 2, 3, 4, 1, 4]);

    for (pages, code) in [
        (vec![one, PageHandle(999)], EINVAL),
        (vec![one, one, one], EINVAL),
        (vec![one, two], EINVAL),
    ] {
        let at = range.offset(6 * PAGE);
        assert_eq!(refusal(driver.map(at, &pages)).1, code, "{pages:?}");
        assert_eq!(
            refusal(unmap(&device, at, 2 * PAGE)).1,
            EINVAL,
            "nothing is mapped"
        );
    }
    unmap(&device, range.offset(4 * PAGE), PAGE).unwrap();
    let busy = driver.map(range.offset(4 * PAGE), &[one, one]);
    assert_eq!(refusal(busy).1, EBUSY);
    driver.map(range.offset(4 * PAGE), &[two]).unwrap_err();
    driver.map(range.offset(4 * PAGE), &[one]).unwrap();
    for page in [one, two, three] {
        driver.destroy_page(page).unwrap();
    }
    unmap(&device, range, 8 * PAGE).unwrap();
    assert_eq!(device.memory_info().unwrap().free, 80 * GIB);
}

#[test]
fn a_destroyed_page_gives_its_memory_back() {
    let device = threads();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(PAGE).unwrap();
    let page = driver.create_page(PAGE).unwrap();
    driver.map(range, &[page]).unwrap();
    fill(&stream, range, 7, PAGE);
    stream.synchronize().unwrap();
    driver.destroy_page(page).unwrap();
    unmap(&device, range, PAGE).unwrap();
    // The next page lies in the same place of the file. Zeros show that the old bytes were given back.
    let page = driver.create_page(PAGE).unwrap();
    driver.map(range, &[page]).unwrap();
    assert_eq!(read(&stream, range, 2 << 20), vec![0; 2 << 20]);
}

#[test]
fn pages_and_plain_memory_share_the_capacity() {
    let device = with_capacity(8 * PAGE);
    let driver = device.driver();
    let page = driver.create_page(5 * PAGE).unwrap();
    let block = allocate(&device, 2 * PAGE);
    let (call, code, _) = refusal(driver.create_page(2 * PAGE));
    assert_eq!((call, code), ("create_page", ENOMEM));
    assert_eq!(refusal(driver.allocate(PAGE + 1)).1, ENOMEM);
    assert_eq!(device.memory_info().unwrap().free, PAGE);
    driver.create_page(PAGE).unwrap();
    // SAFETY: nothing was enqueued.
    unsafe { driver.free(block) }.unwrap();
    driver.create_page(2 * PAGE).unwrap();
    assert_eq!(device.memory_info().unwrap().free, 0);
    driver.destroy_page(page).unwrap();
    assert_eq!(device.memory_info().unwrap().free, 5 * PAGE);
}

#[test]
fn runs_of_the_file_are_used_again() {
    let device = with_capacity(8 * PAGE);
    let driver = device.driver();
    for round in 1..2000_u64 {
        let pages = [round % 3 + 1, round % 2 + 1, 1]
            .map(|count| driver.create_page(count * PAGE).unwrap());
        for page in pages {
            driver.destroy_page(page).unwrap();
        }
    }
    assert_eq!(device.memory_info().unwrap().free, 8 * PAGE);
}

#[test]
fn wrong_lengths_are_refused() {
    let device = threads();
    let driver = device.driver();
    for bytes in [0, 1, PAGE - 1, PAGE + 1, u64::MAX] {
        assert_eq!(refusal(driver.reserve(bytes)).1, EINVAL, "{bytes}");
        assert_eq!(refusal(driver.create_page(bytes)).1, EINVAL, "{bytes}");
        assert_eq!(
            refusal(unmap(&device, DevicePtr(PAGE), bytes)).1,
            EINVAL,
            "{bytes}"
        );
    }
    let most = !(PAGE - 1);
    for bytes in [most, 1 << 62, 1 << 48] {
        let (call, code, _) = refusal(driver.reserve(bytes));
        assert_eq!((call, code), ("reserve", ENOMEM), "{bytes}");
        assert_eq!(refusal(driver.create_page(bytes)).1, ENOMEM, "{bytes}");
    }
    assert_eq!(device.memory_info().unwrap().free, 80 * GIB);
}

#[test]
fn wrong_maps_are_refused_and_change_nothing() {
    let device = threads();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(6 * PAGE).unwrap();
    let (page, small) = (
        driver.create_page(2 * PAGE).unwrap(),
        driver.create_page(PAGE).unwrap(),
    );
    let plain = allocate(&device, 4 * PAGE);
    let top = DevicePtr(!(PAGE - 1));
    for wrong in [
        DevicePtr(0),
        plain,
        range.offset(1),
        range.offset(5 * PAGE),
        range.offset(6 * PAGE),
        DevicePtr(range.0 - PAGE),
        top,
    ] {
        let (call, code, _) = refusal(driver.map(wrong, &[page]));
        assert_eq!((call, code), ("map", EINVAL), "{wrong:?}");
    }
    assert_eq!(refusal(driver.map(range, &[PageHandle(999)])).1, EINVAL);
    let at = range.offset(2 * PAGE);
    driver.map(at, &[page]).unwrap();
    fill(&stream, at, 3, 2 * PAGE);
    for busy in [PAGE, 2 * PAGE, 3 * PAGE] {
        assert_eq!(
            refusal(driver.map(range.offset(busy), &[page])).1,
            EBUSY,
            "{busy}"
        );
    }
    assert_eq!(
        refusal(driver.map(range.offset(3 * PAGE), &[small])).1,
        EBUSY
    );
    assert_eq!(read(&stream, at, 4 << 20), vec![3; 4 << 20]);
    driver.map(range.offset(PAGE), &[small]).unwrap();
    driver.map(range.offset(4 * PAGE), &[page]).unwrap();
    driver.destroy_page(small).unwrap();
    assert_eq!(
        refusal(driver.map(range, &[small])).1,
        EINVAL,
        "its handle is gone"
    );
    assert_eq!(refusal(driver.destroy_page(small)).0, "destroy_page");
}

#[test]
fn wrong_unmaps_and_releases_are_refused_and_change_nothing() {
    let device = threads();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(8 * PAGE).unwrap();
    let page = driver.create_page(3 * PAGE).unwrap();
    let at = range.offset(PAGE);
    driver.map(at, &[page]).unwrap();
    write(&stream, at, &[1, 2, 3]);
    for (start, pages) in [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (2, 1),
        (2, 4),
        (4, 4),
        (7, 1),
        (1, 8),
    ] {
        let (call, code, _) = refusal(unmap(&device, range.offset(start * PAGE), pages * PAGE));
        assert_eq!(
            (call, code),
            ("unmap", EINVAL),
            "{pages} pages from {start}"
        );
    }
    assert_eq!(refusal(unmap(&device, range.offset(1), 4 * PAGE)).1, EINVAL);
    assert_eq!(refusal(driver.release(range, 8 * PAGE)).1, EBUSY);
    assert_eq!(refusal(driver.release(range, PAGE)).1, EINVAL);
    assert_eq!(refusal(driver.release(at, 8 * PAGE)).1, EINVAL);
    assert_eq!(read(&stream, at, 3), [1, 2, 3]);
    // Empty stretches around a mapping do no harm.
    unmap(&device, range, 8 * PAGE).unwrap();
    driver.release(range, 8 * PAGE).unwrap();
    assert_eq!(refusal(driver.release(range, 8 * PAGE)).1, EINVAL);
    assert_eq!(refusal(driver.map(range, &[page])).1, EINVAL);
}

#[test]
fn without_virtual_memory_the_calls_are_refused() {
    let device = Device::host(HostConfig {
        virtual_memory: false,
        ..HostConfig::default()
    })
    .unwrap();
    let driver = device.driver();
    assert!(!device.properties().virtual_memory);
    let (ptr, page) = (DevicePtr(PAGE), PageHandle(1));
    for (call, outcome) in [
        ("reserve", driver.reserve(PAGE).map(drop)),
        ("release", driver.release(ptr, PAGE)),
        ("create_page", driver.create_page(PAGE).map(drop)),
        ("destroy_page", driver.destroy_page(page)),
        ("map", driver.map(ptr, &[page])),
        ("unmap", unmap(&device, ptr, PAGE)),
    ] {
        let (named, code, reason) = refusal(outcome);
        assert_eq!((named, code), (call, ENOTSUP));
        assert!(reason.contains("virtual memory"), "{reason}");
    }
    allocate(&device, PAGE);
}

#[test]
fn mappings_last_as_long_as_queued_work_and_no_longer() {
    let device = threads();
    let driver = device.driver();
    let platform = driver.platform();
    let range = driver.reserve(PAGE).unwrap();
    let page = driver.create_page(PAGE).unwrap();
    driver.map(range, &[page]).unwrap();
    let stream = device.create_stream().unwrap();
    let (sender, receiver) = channel();
    let gate = Gate::close(&stream);
    fill(&stream, range, 1, PAGE);
    copy(&stream, range.offset(1), range, 1000);
    act(&stream, move || sender.send(mappings_of(platform)).unwrap());
    drop((stream, device));
    gate.open();
    assert_eq!(receiver.recv().unwrap(), 1, "the work found its memory");
    // The stream's thread is about to end; without a leak, this loop is, too.
    let name = format!("/memfd:kitsune-{platform}-0 ");
    while read_to_string("/proc/self/maps").unwrap().contains(&name) {
        yield_now();
    }
}
