//! The schedule that a seed decides.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::support::driver::{act, allocate, copy, fill, read, refusal, seeded, try_act};
use kitsune::{Event, Result};
use parking_lot::Mutex;

const SEEDS: u64 = 2000;

/// Whether a second stream waits for the first before it takes what the first one makes.
#[derive(Clone, Copy, PartialEq)]
enum Program {
    Right,
    MissingWait,
    /// The wait is there, but the first stream overwrites its result before the second has read it.
    MissingWaitBack,
}

/// The bytes that the second stream sees.
fn run(program: Program, seed: u64) -> Vec<u8> {
    let device = seeded(seed);
    let (first, second) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
    let (a, b) = (allocate(&device, 64), allocate(&device, 64));
    fill(&first, a, 1, 64);
    fill(&first, a, 2, 64);
    if program != Program::MissingWait {
        second.wait_for(&first).unwrap();
    }
    copy(&second, b, a, 64);
    if program == Program::Right {
        first.wait_for(&second).unwrap();
    }
    if program != Program::MissingWait {
        fill(&first, a, 3, 64);
    }
    read(&second, b, 64)
}

#[test]
fn a_right_program_passes_under_every_seed() {
    for seed in 0..SEEDS {
        assert_eq!(run(Program::Right, seed), [2; 64], "seed {seed}");
    }
}

#[test]
fn a_missing_wait_shows_under_some_seeds() {
    let seen = |program| -> BTreeSet<u8> { (0..SEEDS).map(|seed| run(program, seed)[0]).collect() };
    assert_eq!(seen(Program::MissingWait), BTreeSet::from([0, 1, 2]));
    assert_eq!(seen(Program::MissingWaitBack), BTreeSet::from([2, 3]));
}

/// The order in which three streams ran, with host calls of every kind between.
fn interleaving(seed: u64) -> Vec<u32> {
    let device = seeded(seed);
    let order = Arc::new(Mutex::new(Vec::new()));
    let streams: Vec<_> = (0..3).map(|_| device.create_stream().unwrap()).collect();
    for step in 0..20 {
        for (number, stream) in (0..).zip(&streams) {
            let order = Arc::clone(&order);
            act(stream, move || order.lock().push(number * 100 + step));
        }
        if step == 5 {
            streams[0].wait_for(&streams[1]).unwrap();
        }
        if step == 10 {
            streams[2].synchronize().unwrap();
            streams[1].is_idle().unwrap();
        }
    }
    for stream in &streams {
        stream.synchronize().unwrap();
    }
    let order = order.lock().clone();
    assert_eq!(order.len(), 60);
    order
}

#[test]
fn a_seed_gives_the_same_order_every_time() {
    let mut orders = BTreeSet::new();
    for seed in 0..200 {
        let order = interleaving(seed);
        assert_eq!(order, interleaving(seed), "seed {seed}");
        orders.insert(order);
    }
    assert!(orders.len() > 190, "200 seeds gave {} orders", orders.len());
}

#[test]
fn asking_again_and_again_comes_to_an_end() {
    for seed in 0..50 {
        let device = seeded(seed);
        let stream = device.create_stream().unwrap();
        let a = allocate(&device, 1);
        let event = Event::new(&device).unwrap();
        for _ in 0..20 {
            fill(&stream, a, 1, 1);
        }
        event.record(&stream).unwrap();
        while !event.is_complete().unwrap() {}
        fill(&stream, a, 1, 1);
        while !stream.is_idle().unwrap() {}
    }
}

#[test]
fn work_is_often_left_for_later() {
    let mut pending = 0;
    for seed in 0..100 {
        let device = seeded(seed);
        let stream = device.create_stream().unwrap();
        let a = allocate(&device, 1);
        fill(&stream, a, 1, 1);
        let event = stream.record().unwrap();
        pending += u32::from(!event.is_complete().unwrap());
    }
    assert!((10..90).contains(&pending), "{pending} of 100");
}

#[test]
fn a_kernel_that_waits_for_itself_is_told_so() {
    for seed in 0..20 {
        let device = seeded(seed);
        let stream = device.create_stream().unwrap();
        let (inside, told) = (stream.clone(), Arc::new(Mutex::new(None)));
        let tell = Arc::clone(&told);
        act(&stream, move || {
            // Enqueuing from inside a kernel works; only waiting cannot.
            let enqueued: Result<()> = try_act(&inside, || {});
            *tell.lock() = Some((enqueued, inside.synchronize()));
        });
        stream.synchronize().unwrap();
        let (enqueued, waited) = told.lock().take().expect("the kernel ran");
        enqueued.unwrap();
        let (call, code, _) = refusal(waited);
        assert_eq!((call, code), ("synchronize_stream", 35));
    }
}
