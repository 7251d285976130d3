//! A block allocated and freed at once, again and again: the price of an allocator on its shortest path.

use kitsune::Result;
use kitsune::units::{KIB, MIB};
use serde_json::json;

use crate::clock::host_time;
use crate::peers::{Cudarc, Kitsune, Malloc, MallocAsync, Peer};
use crate::setting::Setting;

const SIZES: [(&str, u64); 3] = [("512B", 512), ("64KiB", 64 * KIB), ("4MiB", 4 * MIB)];

pub(crate) fn run(setting: &Setting) -> Result<()> {
    let few = u32::try_from(setting.size(2000, 20)).unwrap_or(1);
    let many = 50 * few;
    let nothing = || Ok(());
    let kitsune = Kitsune::new(&setting.device, 1)?;
    time(setting, "kitsune", many, &kitsune, nothing)?;
    let malloc_async = MallocAsync::new(&setting.cuda, &setting.device, 1)?;
    time(setting, "cudaMallocAsync", few, &malloc_async, || {
        malloc_async.synchronize()
    })?;
    let cudarc = Cudarc::new(1)?;
    time(setting, "cudarc", few, &cudarc, || cudarc.synchronize())?;
    time(
        setting,
        "cudaMalloc",
        few / 20,
        &Malloc(&setting.cuda),
        nothing,
    )
}

/// Nanoseconds a pair; `settle` waits for what the device is behind with, and is not timed.
fn time<P: Peer>(
    setting: &Setting,
    name: &str,
    count: u32,
    peer: &P,
    mut settle: impl FnMut() -> Result<()>,
) -> Result<()> {
    for (size, bytes) in SIZES {
        let pair = || peer.free(peer.allocate(std::hint::black_box(bytes), 0)?);
        let time = host_time(count, pair, &mut settle)?;
        setting.tell("pairs", &format!("{name}/{size}"), json!({ "ns": time }));
    }
    Ok(())
}
