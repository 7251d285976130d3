//! Cases about memory that changes streams.

use kitsune::{PoolConfig, ReusePolicy};

use crate::support::driver::{copy, fill, read};
use crate::support::subject::{MIB, OWN, Subject, setup, setup_with};

pub(crate) fn case_15_a_recorded_block_waits_for_the_other_stream<S: Subject>() {
    let bytes = OWN;
    let (device, pool, home) = setup::<S>(256 * MIB);
    let main = device.create_stream().unwrap();
    let result = pool.allocate(bytes, &main).unwrap();
    let mut block = pool.allocate(bytes, &home).unwrap();
    let address = block.ptr();
    fill(&home, address, 3, bytes);
    main.wait_for(&home).unwrap();
    let open = S::hold(&main);
    copy(&main, result.ptr(), address, bytes);
    block.record_stream(&main);
    drop(block);
    let meanwhile = pool.allocate(bytes, &home).unwrap();
    assert_ne!(meanwhile.ptr(), address, "the copy has not run");
    fill(&home, meanwhile.ptr(), 4, bytes);
    open();
    main.synchronize().unwrap();
    let shown = read(&main, result.ptr(), 12 << 20);
    assert!(shown.iter().all(|byte| *byte == 3));
    let again = pool.allocate(bytes, &home).unwrap();
    assert_eq!(again.ptr(), address, "the copy has run");
}

/// Where pages are mapped, a stream may have another's memory once it is known or made to be past its use;
/// CuPy never lets it. Plain segments stay with their stream here too.
pub(crate) fn case_56_a_freed_block_on_another_stream<S: Subject>() {
    let bytes = OWN;
    for reuse in [
        ReusePolicy::Never,
        ReusePolicy::OnlyComplete,
        ReusePolicy::Wait,
    ] {
        let config = PoolConfig {
            reuse,
            ..PoolConfig::default()
        };
        let (device, pool, home) = setup_with::<S>(256 * MIB, config);
        let other = device.create_stream().unwrap();
        let open = S::hold(&home);
        let block = pool.allocate(bytes, &home).unwrap();
        let address = block.ptr();
        fill(&home, address, 1, bytes);
        drop(block);
        let block = pool.allocate(bytes, &other).unwrap();
        let may_wait = reuse == ReusePolicy::Wait && S::IS_PAGED;
        assert_eq!(block.ptr() == address, may_wait, "{reuse}");
        fill(&other, block.ptr(), 2, bytes);
        if may_wait {
            assert!(!other.is_idle().unwrap(), "the other stream waits");
        }
        open();
        let shown = read(&other, block.ptr(), 12 << 20);
        assert!(shown.iter().all(|byte| *byte == 2), "{reuse}");
    }
}
