//! Recorded and generated runs on each allocator: nanoseconds for an allocation with its free, and the memory that
//! the device lacks afterwards.
//!
//! `scripts/gpu/peers.py` plays the same traces by the same rules on allocators of Python's world.

use std::time::Instant;

use kitsune::Result;
use serde_json::json;

use crate::clock::{median, repeat};
use crate::peers::{Cudarc, Kitsune, MallocAsync, Peer};
use crate::program::Program;
use crate::setting::Setting;

pub(crate) fn run(setting: &Setting) -> Result<()> {
    for path in &setting.traces {
        let program = Program::read(path)?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let streams = program.streams;
        let kitsune = Kitsune::new(&setting.device, streams)?;
        play(setting, &format!("kitsune/{stem}"), &program, &kitsune)?;
        drop(kitsune);
        attempt(setting, &format!("cudarc/{stem}"), &program, || {
            Cudarc::new(streams)
        });
        attempt(
            setting,
            &format!("cudaMallocAsync/{stem}"),
            &program,
            || MallocAsync::new(&setting.cuda, &setting.device, streams),
        );
    }
    Ok(())
}

/// Another allocator may have no room for a run that ours has room for: that is told, and no failure of this program.
fn attempt<P: Peer>(
    setting: &Setting,
    name: &str,
    program: &Program,
    open: impl FnOnce() -> Result<P>,
) {
    let outcome = open().and_then(|peer| {
        play(setting, name, program, &peer)?;
        peer.synchronize()
    });
    if let Err(error) = outcome {
        setting.tell("runs", name, json!({ "failed": error.to_string() }));
    }
}

#[expect(clippy::cast_precision_loss, reason = "ratios for people")]
fn play<P: Peer>(setting: &Setting, name: &str, program: &Program, peer: &P) -> Result<()> {
    let mut live = Vec::new();
    let free = setting.device.memory_info()?.free;
    let start = Instant::now();
    program.play(peer, &mut live)?;
    let cold = start.elapsed().as_secs_f64() * 1e3;
    let held = free.saturating_sub(setting.device.memory_info()?.free);
    let times = repeat(|| {
        let start = Instant::now();
        program.play(peer, &mut live)?;
        Ok(start.elapsed().as_secs_f64() * 1e9 / program.allocations.max(1) as f64)
    })?;
    setting.tell(
        "runs",
        name,
        json!({
            "ns": median(times),
            "cold_ms": cold,
            "allocations": program.allocations,
            "peak_requested_bytes": program.peak_bytes,
            "held_bytes": held,
            "ratio": held as f64 / program.peak_bytes.max(1) as f64,
        }),
    );
    Ok(())
}
