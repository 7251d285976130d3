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
    time(
        setting,
        "kitsune",
        50 * few,
        &Kitsune::new(&setting.device, 1)?,
    )?;
    let malloc_async = MallocAsync::new(&setting.cuda, &setting.device, 1)?;
    time(setting, "cudaMallocAsync", few, &malloc_async)?;
    drop(malloc_async);
    time(setting, "cudaMalloc", few / 20, &Malloc(&setting.cuda))?;
    match Cudarc::new(1) {
        Ok(cudarc) => time(setting, "cudarc", few, &cudarc),
        Err(error) => {
            setting.tell(
                "pairs",
                "cudarc/512B",
                json!({ "failed": error.to_string() }),
            );
            Ok(())
        }
    }
}

/// Nanoseconds a pair. What the device is behind with is waited for in between, and not timed.
fn time<P: Peer>(setting: &Setting, name: &str, count: u32, peer: &P) -> Result<()> {
    for (size, bytes) in SIZES {
        let pair = || peer.free(peer.allocate(std::hint::black_box(bytes), 0)?);
        let time = host_time(count, pair, || peer.synchronize())?;
        setting.tell("pairs", &format!("{name}/{size}"), json!({ "ns": time }));
    }
    Ok(())
}
