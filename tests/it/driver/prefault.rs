//! Memory that comes before it is touched: when the host device asks the system for huge pages, and when not.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]
#![cfg(target_os = "linux")]

use crate::support::process;
use std::thread::scope;

use crate::support::driver::{fill, read, threads, write};
use kitsune::driver::DevicePtr;
use kitsune::driver::host::PAGE_GRANULARITY as PAGE;
use kitsune::memory::PinnedPool;
use kitsune::optim::{Parameter, Sgd, SgdConfig};
use kitsune::units::MIB;
use kitsune::{Context, DType, Device, Result, Tensor, ops};
use parking_lot::RwLock;

/// Held for writing while the process is denied huge pages, for reading by tests that hope for some.
static DENIAL: RwLock<()> = RwLock::new(());

fn unmap(device: &Device, ptr: DevicePtr, bytes: u64) -> Result<()> {
    // SAFETY: the tests synchronize before they unmap.
    unsafe { device.driver().unmap(ptr, bytes) }
}

/// Whether the system makes a huge page of shared memory when it is told to, as tried on a page of `device`.
fn makes_huge_pages(device: &Device) -> bool {
    const MADV_COLLAPSE: libc::c_int = 25;
    let driver = device.driver();
    let range = driver.reserve(PAGE).unwrap();
    driver
        .map(range, &[driver.create_page(PAGE).unwrap()])
        .unwrap();
    let stream = device.create_stream().unwrap();
    write(&stream, range, &[1]);
    stream.synchronize().unwrap();
    // SAFETY: the advice changes no contents.
    unsafe { libc::madvise(pointer(range), to_usize(PAGE), MADV_COLLAPSE) == 0 }
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

fn pointer(ptr: DevicePtr) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(to_usize(ptr.0))
}

/// How many of the system's pages have memory in a device page at `ptr`.
fn resident(ptr: DevicePtr) -> usize {
    let bytes = to_usize(PAGE);
    let mut pages = vec![0u8; bytes / 4096];
    // SAFETY: the array has a byte for each page of a system with pages of 4 KiB, and for fewer else.
    let outcome = unsafe { libc::mincore(pointer(ptr), bytes, pages.as_mut_ptr()) };
    assert_eq!(outcome, 0);
    pages.iter().filter(|page| **page & 1 == 1).count()
}

#[test]
fn a_prefault_brings_the_memory_of_untouched_pages_and_changes_no_byte() {
    let _hoping = DENIAL.read();
    let device = threads();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(4 * PAGE).unwrap();
    let pages: Vec<_> = (0..4).map(|_| driver.create_page(PAGE).unwrap()).collect();
    driver.map(range, &pages).unwrap();
    let at = |page: u64| range.offset(page * PAGE);
    write(&stream, at(1).offset(7), &[1, 2, 3]);
    stream.synchronize().unwrap();
    driver.prefault(at(0), 0);
    driver.prefault(DevicePtr(u64::MAX), u64::MAX);
    assert_eq!([0, 1, 2, 3].map(|page| resident(at(page))), [0, 1, 0, 0]);

    // From the middle of the first to the middle of the third.
    driver.prefault(at(0).offset(PAGE / 2), 2 * PAGE);
    let all = to_usize(PAGE / 4096);
    let expected = if makes_huge_pages(&device) {
        [all, 1, all, 0]
    } else {
        [1, 1, 1, 0]
    };
    let now = || [0, 1, 2, 3].map(|page| resident(at(page)));
    assert_eq!(now(), expected);
    assert_eq!(read(&stream, at(1).offset(6), 5), [0, 1, 2, 3, 0]);
    assert_eq!(read(&stream, at(2).offset(PAGE - 1), 1), [0]);

    // A page counts as asked for until it is destroyed; the next one there has no memory again.
    unmap(&device, range, 4 * PAGE).unwrap();
    pages
        .into_iter()
        .for_each(|page| driver.destroy_page(page).unwrap());
    let page = driver.create_page(PAGE).unwrap();
    driver.map(range, &[page]).unwrap();
    assert_eq!(resident(range), 0);
    driver.prefault(range, 1);
    assert_eq!(resident(range), expected[0]);
}

/// `count` pages side by side, and where.
fn mapped(device: &Device, count: u64) -> DevicePtr {
    let driver = device.driver();
    let range = driver.reserve(count * PAGE).unwrap();
    let pages: Vec<_> = (0..count)
        .map(|_| driver.create_page(PAGE).unwrap())
        .collect();
    driver.map(range, &pages).unwrap();
    range
}

#[test]
fn a_page_is_asked_for_once_at_whichever_address() {
    let _hoping = DENIAL.read();
    let device = threads();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(8 * PAGE).unwrap();
    let [one, two] = [(); 2].map(|()| driver.create_page(PAGE).unwrap());
    driver.map(range, &[one, two, one]).unwrap();
    driver.prefault(range.offset(2 * PAGE), PAGE);
    let whole = resident(range);
    assert!(whole >= 1);
    assert_eq!(resident(range.offset(PAGE)), 0);
    for (at, value) in [(0, 1), (2 * PAGE + 7, 2), (PAGE, 3)] {
        write(&stream, range.offset(at), &[value]);
    }
    driver.prefault(range, 3 * PAGE);
    stream.synchronize().unwrap();
    assert_eq!(
        read(&stream, range.offset(2 * PAGE), 8)[..],
        [1, 0, 0, 0, 0, 0, 0, 2]
    );
    assert_eq!(read(&stream, range, 8)[..], [1, 0, 0, 0, 0, 0, 0, 2]);

    // A page that is larger comes as a whole or not at all.
    let large = driver.create_page(3 * PAGE).unwrap();
    let at = range.offset(4 * PAGE);
    driver.map(at, &[large]).unwrap();
    let now = || [0, 1, 2].map(|part| resident(at.offset(part * PAGE)));
    driver.prefault(at, 3 * PAGE - 1);
    assert_eq!(now(), [0; 3]);
    driver.prefault(at, 3 * PAGE);
    assert_eq!(now(), [whole; 3]);
}

#[test]
fn what_others_write_meanwhile_stays() {
    let device = threads();
    for _ in 0..20 {
        let range = mapped(&device, 16);
        scope(|scope| {
            for value in 1..=3 {
                let device = &device;
                scope.spawn(move || {
                    // Each thread has a part of each page.
                    let stream = device.create_stream().unwrap();
                    let part = |page: u64| range.offset(page * PAGE + u64::from(value) * PAGE / 4);
                    for page in 0..16 {
                        device.driver().prefault(part(page), PAGE / 4);
                        fill(&stream, part(page), value, PAGE / 4);
                    }
                    for page in 0..16 {
                        let seen = read(&stream, part(page), to_usize(PAGE / 4));
                        assert!(seen.iter().all(|byte| *byte == value), "page {page}");
                    }
                });
            }
        });
        assert_eq!(read(&device.create_stream().unwrap(), range, 9), [0; 9]);
        unmap(&device, range, 16 * PAGE).unwrap();
    }
}

#[test]
fn a_system_that_refuses_is_not_asked_forever() {
    process::alone(
        process::test_name!("a_system_that_refuses_is_not_asked_forever"),
        || {
            let _denying = DENIAL.write();
            let deny = |is_denied: libc::c_ulong| {
                // SAFETY: a setting of this process.
                let outcome = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, is_denied, 0, 0, 0) };
                assert_eq!(outcome, 0);
            };
            deny(1);
            let device = threads();
            let range = mapped(&device, 12);
            let ask = |page: u64| {
                device.driver().prefault(range.offset(page * PAGE), PAGE);
                resident(range.offset(page * PAGE))
            };
            assert!(!makes_huge_pages(&device));
            // The first byte of a page is touched before the system is asked.
            assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(ask), [1; 8]);
            assert_eq!(ask(8), 0);
            // One call for what is left asks as little.
            device.driver().prefault(range, 12 * PAGE);
            assert_eq!(resident(range.offset(11 * PAGE)), 0);
            let other = threads();
            let fresh = mapped(&other, 12);
            other.driver().prefault(fresh, 12 * PAGE);
            let touched = (0..12).map(|page| resident(fresh.offset(page * PAGE)));
            assert_eq!(touched.sum::<usize>(), 8);
            deny(0);
            assert_eq!(ask(9), 0);
        },
    );
}

#[test]
fn tensors_cost_nothing_until_they_are_used_and_then_what_is_used() {
    let _hoping = DENIAL.read();
    let context = Context::new(&threads()).unwrap();
    let row = to_usize(PAGE / 4);
    let tensor = Tensor::uninit(&context, [8, row], DType::F32).unwrap();
    let now = || {
        context.synchronize().unwrap();
        [0, 1, 2, 3, 4, 5, 6, 7].map(|page| resident(tensor.ptr().offset(page * PAGE)))
    };
    assert_eq!(now(), [0; 8]);
    tensor.narrow(0, 2, 3).unwrap().fill(1.0).unwrap();
    assert_eq!(now(), [0, 0, 512, 512, 512, 0, 0, 0]);
    // Of a view with gaps, no more than what is written.
    let column = tensor.narrow(0, 4, 4).unwrap().narrow(1, 0, 8).unwrap();
    column.fill(1.0).unwrap();
    assert_eq!(now(), [0, 0, 512, 512, 512, 1, 1, 1]);
    // Of a table, the rows that are picked.
    let ids = Tensor::from_slice(&context, [1], &[3u32]).unwrap();
    let picked = ops::embedding(&tensor, &ids).unwrap();
    assert!(
        picked
            .to_vec::<f32>()
            .unwrap()
            .iter()
            .all(|one| *one == 1.0)
    );
    Parameter::new("table", tensor.clone())
        .and_then(|table| Sgd::new(vec![table], SgdConfig::default()))
        .unwrap();
    assert_eq!(now(), [0, 0, 512, 512, 512, 1, 1, 1]);
}

/// A tensor of its elements in a pool of its own, by each way to write one as a whole.
fn written(device: &Device, way: usize, values: &[f32]) -> Tensor {
    let context = Context::new(device).unwrap();
    let other = Context::new(device).unwrap();
    let tensor = || Tensor::uninit(&context, [values.len()], DType::F32).unwrap();
    match way {
        0 => Tensor::zeros(&context, [values.len()], DType::F32).unwrap(),
        1 => Tensor::full(&context, [values.len()], DType::F32, 1.0).unwrap(),
        2 => Tensor::from_slice(&context, [values.len()], values).unwrap(),
        3 => Tensor::from_slice(&other, [values.len()], values)
            .and_then(|source| source.copy_to(&context))
            .unwrap(),
        _ => {
            let tensor = tensor();
            let pinned = PinnedPool::new(device);
            let mut block = pinned.allocate(4 * values.len() as u64).unwrap();
            tensor.copy_from_pinned(&mut block).unwrap();
            tensor
        }
    }
}

#[test]
fn memory_that_is_written_throughout_comes_in_huge_pages() {
    let _hoping = DENIAL.read();
    let device = threads();
    let values = vec![1.0; to_usize(5 * MIB / 16)];
    let expected = if makes_huge_pages(&device) { 512 } else { 320 };
    for way in 0..5 {
        let tensor = written(&device, way, &values);
        tensor.context().synchronize().unwrap();
        assert_eq!(resident(tensor.ptr()), expected, "way {way}");
    }
}
