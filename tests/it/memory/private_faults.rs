//! Private memory when the driver refuses: whichever call fails once, the pool stays sound.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests launch graphs and kernels on plain addresses, and fail by panicking"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::driver::try_act;
use kitsune::driver::fault::FaultDriver;
use kitsune::{Device, HostConfig, Pool, PoolConfig, Stream};

const PAGE: u64 = 2 << 20;

/// A pass, a capture, launches, a second capture; every call may fail.
fn program(
    pool: &Pool,
    stream: &Stream,
    side: &Stream,
    ran: &Arc<AtomicU32>,
) -> kitsune::Result<()> {
    let private = pool.private()?;
    let work = || {
        let mut kept = Vec::new();
        for bytes in [512, 3 * PAGE, 300 << 10, PAGE] {
            kept.push(pool.allocate(bytes, stream)?);
            kept.push(pool.allocate(bytes, side)?);
        }
        kept[1].record_use(stream);
        let ran = Arc::clone(ran);
        try_act(stream, move || {
            ran.fetch_add(1, Ordering::SeqCst);
        })
    };
    let forked = || {
        side.wait_for(stream)?;
        work()?;
        stream.wait_for(side)
    };
    private.prime(work)?;
    let graph = private.capture(stream, forked)?;
    let again = private.capture(stream, forked)?;
    for graph in [graph, again] {
        // SAFETY: the work touches no memory.
        unsafe { graph.launch(stream) }?;
    }
    drop(private);
    // What it left serves the next one and blocks.
    let next = pool.private()?;
    let work = || pool.allocate(PAGE, stream).map(drop);
    next.prime(work)?;
    drop((pool.allocate(3 * PAGE, side)?, next));
    drop(pool.allocate(5 * PAGE, stream)?);
    stream.synchronize()
}

#[test]
fn every_driver_call_fails_once() {
    for contiguous in [false, true] {
        let survives = |nth: u64| {
            let config = HostConfig {
                capacity: 256 << 20,
                ..HostConfig::default()
            };
            let inner = Device::host(config).unwrap();
            let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
            let config = PoolConfig {
                contiguous,
                ..PoolConfig::default()
            };
            let device = Device::from_driver(faults.clone());
            let pool = Pool::new(&device, config).unwrap();
            let (stream, side) = (
                device.create_stream().unwrap(),
                device.create_stream().unwrap(),
            );
            let ran = Arc::default();
            faults.fail_nth(None, nth);
            let outcome = program(&pool, &stream, &side, &ran);
            let fired = faults.disarm() == 0;
            pool.check_invariants();
            // The end of a capture that was made to fail never reached the driver.
            if let Ok(graph) = pool.device().driver().end_capture(stream.raw()) {
                pool.device().driver().destroy_graph(graph).unwrap();
            }
            drop(pool.allocate(PAGE, &stream).unwrap());
            pool.empty_cache().unwrap();
            pool.check_invariants();
            assert_eq!(pool.stats().active_bytes.current, 0, "call {nth}");
            if !fired {
                outcome.unwrap();
                assert_eq!(ran.load(Ordering::SeqCst), 3);
                assert_eq!(pool.stats().reserved_bytes.current, 0);
            }
            fired
        };
        let survived = (1..).take_while(|nth| survives(*nth)).count();
        assert!(survived > 30, "{survived} faults fired");
    }
}
