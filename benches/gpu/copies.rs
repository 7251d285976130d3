//! How fast memory is: the ceiling for kernels that do little else than read and write.

use kitsune::driver::DevicePtr;
use kitsune::units::{GIB, MIB, to_usize};
use kitsune::{Pool, PoolConfig, Result, Stream};
use serde_json::json;

use crate::clock::device_time;
use crate::setting::Setting;

pub(crate) fn run(setting: &Setting) -> Result<()> {
    let pool = Pool::new(&setting.device, PoolConfig::default())?;
    let stream = setting.device.create_stream()?;
    let driver = stream.driver();
    for (name, full) in [("400MB", 400_000_000), ("1GiB", GIB), ("4GiB", 4 * GIB)] {
        let bytes = setting.size(to_usize(full), to_usize(MIB)) as u64;
        let (from, to) = (
            pool.allocate(bytes, &stream)?,
            pool.allocate(bytes, &stream)?,
        );
        fill(&stream, from.ptr(), bytes)?;
        let time = device_time(setting, &stream, || {
            // SAFETY: both blocks are alive until the stream was waited for, and different.
            unsafe { driver.copy(to.ptr(), from.ptr(), bytes, stream.raw()) }
        })?;
        tell(setting, &format!("copy/{name}"), 2 * bytes, time);
        let time = device_time(setting, &stream, || fill(&stream, to.ptr(), bytes))?;
        tell(setting, &format!("fill/{name}"), bytes, time);
    }
    let bytes = setting.size(to_usize(256 * MIB), to_usize(MIB)) as u64;
    let block = pool.allocate(bytes, &stream)?;
    let pinned = driver.allocate_pinned(bytes)?;
    for (name, to, from) in [
        ("upload_pinned", block.ptr(), pinned),
        ("download_pinned", pinned, block.ptr()),
    ] {
        let time = device_time(setting, &stream, || {
            // SAFETY: both ranges are alive until the stream was waited for, and different.
            unsafe { driver.copy(to, from, bytes, stream.raw()) }
        })?;
        tell(setting, name, bytes, time);
    }
    // SAFETY: the stream was waited for after the last copy.
    unsafe { driver.free_pinned(pinned) }
}

fn fill(stream: &Stream, ptr: DevicePtr, bytes: u64) -> Result<()> {
    // SAFETY: the callers' blocks are alive until the stream was waited for, and nobody else uses them.
    unsafe { stream.driver().fill(ptr, 0, bytes, stream.raw()) }
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn tell(setting: &Setting, name: &str, bytes: u64, microseconds: f64) {
    let rate = bytes as f64 / microseconds / 1e3;
    setting.tell(
        "copies",
        name,
        json!({ "us": microseconds, "gb_per_s": rate, "bytes": bytes }),
    );
}
