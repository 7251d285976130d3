//! The wrapper that makes driver calls fail.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]

use std::sync::Arc;

use crate::support::driver::{allocate, devices, fill, read, refusal, threads};
use kitsune::driver::Driver;
use kitsune::driver::fault::{Fault, FaultDriver, FaultKind};
use kitsune::{Device, Event, Result};

fn wrapped(inner: &Device) -> (Arc<FaultDriver>, Device) {
    let faults = Arc::new(FaultDriver::new(Arc::clone(inner.driver())));
    (Arc::clone(&faults), Device::from_driver(faults))
}

#[test]
fn the_named_call_fails_once_and_without_effect() {
    let (faults, device) = wrapped(&threads());
    faults.arm(Fault {
        call: Some("allocate"),
        nth: 2,
        kind: FaultKind::Other {
            code: 12,
            reason: "full".to_owned(),
        },
    });
    let free = device.memory_info().unwrap().free;
    allocate(&device, 4096);
    let (call, code, reason) = refusal(device.driver().allocate(4096));
    assert_eq!((call, code, &*reason), ("allocate", 12, "full"));
    assert_eq!(device.memory_info().unwrap().free, free - 4096);
    allocate(&device, 4096);
    assert_eq!(
        (faults.calls("allocate"), faults.calls("memory_info")),
        (3, 2)
    );
    assert_eq!(faults.total_calls(), 5);
    faults.reset_calls();
    assert_eq!((faults.calls("allocate"), faults.total_calls()), (0, 0));
    assert_eq!(faults.disarm(), 0);
}

#[test]
fn every_kind_is_an_error_of_the_call() {
    let (faults, device) = wrapped(&threads());
    let messages = FaultKind::ALL.map(|kind| {
        faults.arm(Fault {
            call: None,
            nth: 1,
            kind,
        });
        device.memory_info().unwrap_err().to_string()
    });
    assert!(
        messages
            .iter()
            .all(|message| message.starts_with("memory_info"))
    );
    assert!(messages[3].contains("capture"), "{messages:?}");
    let distinct: std::collections::BTreeSet<_> = messages.iter().collect();
    assert_eq!(distinct.len(), messages.len());
}

#[test]
fn faults_that_are_due_together_fire_one_after_the_other() {
    let (faults, device) = wrapped(&threads());
    faults.fail_nth(None, 1);
    faults.fail_nth(Some("memory_info"), 1);
    faults.fail_nth(Some("reserve"), 1);
    assert!(device.memory_info().is_err());
    assert!(device.memory_info().is_err());
    assert!(device.memory_info().is_ok());
    assert_eq!(faults.disarm(), 1);
    assert!(device.driver().reserve(2 << 20).is_ok());
}

/// A program that uses streams, events and copies, and cleans up by itself.
fn program(device: &Device) -> Result<Vec<u8>> {
    let (first, second) = (device.create_stream()?, device.create_stream()?);
    let event = Event::new(device)?;
    let a = device.driver().allocate(16)?;
    let outcome = (|| {
        // SAFETY: `a` is freed below, behind a synchronization.
        unsafe { device.driver().fill(a, 6, 16, first.raw()) }?;
        event.record(&first)?;
        second.wait(&event)?;
        let mut bytes = vec![0; 16];
        // SAFETY: as above.
        unsafe { device.driver().copy_to_host(&mut bytes, a, second.raw()) }?;
        Ok(bytes)
    })();
    while first.synchronize().is_err() {}
    // SAFETY: the only stream that wrote was synchronized, the other had nothing enqueued but a wait.
    while unsafe { device.driver().free(a) }.is_err() {}
    outcome
}

#[test]
fn every_call_of_a_program_can_fail() {
    for inner in devices() {
        let (faults, device) = wrapped(&inner);
        let expected = program(&device).unwrap();
        assert_eq!(expected, vec![6; 16]);
        let calls = faults.total_calls();
        let mut failed = 0;
        for nth in 1.. {
            faults.fail_nth(None, nth);
            let outcome = program(&device);
            if faults.disarm() > 0 {
                assert_eq!(outcome.unwrap(), expected);
                assert_eq!(nth, calls + 1, "every call was made to fail");
                break;
            }
            failed += u32::from(outcome.is_err());
        }
        assert_eq!(failed, 8, "those before the cleanup");
        assert_eq!(inner.memory_info().unwrap(), device.memory_info().unwrap());
        assert_eq!(
            inner.memory_info().unwrap().free,
            inner.properties().total_memory
        );
    }
}

#[test]
#[should_panic(expected = "no fallible method of Driver is called `alocate`")]
fn a_misspelled_call_is_not_taken() {
    let (faults, _device) = wrapped(&threads());
    faults.fail_nth(Some("alocate"), 1);
}

#[test]
fn what_cannot_fail_is_passed_on() {
    let inner = threads();
    let (faults, device) = wrapped(&inner);
    faults.fail_nth(None, 1);
    assert_eq!(
        device.properties().total_memory,
        inner.properties().total_memory
    );
    assert_eq!(faults.platform(), inner.driver().platform());
    assert_eq!((faults.total_calls(), faults.disarm()), (0, 1));
    // Handles of both mean the same.
    let stream = device.create_stream().unwrap();
    let a = allocate(&inner, 4);
    fill(&stream, a, 1, 4);
    inner.driver().synchronize_stream(stream.raw()).unwrap();
    assert_eq!(read(&stream, a, 4), [1; 4]);
}
