//! What tests call to steer the machine and to see what was asked of it.

use std::ffi::{CStr, c_char, c_int};

use crate::config::{Config, Fault};
use crate::sim::{Sim, with};

/// A text that a test passed.
fn text<'a>(text: *const c_char) -> &'a str {
    // SAFETY: tests pass texts that end with zero and live until the call returns.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().expect("tests pass UTF-8")
}

/// Copies as much of `from` as fits to `len` bytes at `place`; how long all of it is.
fn copy_out(from: &str, place: *mut u8, len: usize) -> usize {
    let bytes = from.len().min(len);
    // SAFETY: the test has so many bytes there.
    unsafe { place.copy_from_nonoverlapping(from.as_ptr(), bytes) };
    from.len()
}

/// Forgets counts, log and faults, heals the context, and goes back to the first settings. What is held stays.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_reset() {
    with(|sim| {
        sim.config = Config::from_environment();
        sim.broken = None;
        sim.log.clear();
        sim.counts.clear();
        sim.complaints.clear();
        sim.shim = None;
    });
}

/// Changes a setting; 0 if it was understood.
///
/// # Safety
/// Both texts end with zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simcuda_set(key: *const c_char, value: *const c_char) -> c_int {
    let set = with(|sim| sim.config.set(text(key), text(value)));
    set.map_or(1, |()| 0)
}

/// Makes the `nth` call of `name` from now on return `code`.
///
/// # Safety
/// The text ends with zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simcuda_fail(name: *const c_char, nth: u64, code: c_int) {
    let name = text(name).to_owned();
    with(|sim| sim.config.faults.push(Fault { name, nth, code }));
}

/// How many faults have not fired.
#[unsafe(no_mangle)]
pub extern "C" fn simcuda_armed() -> usize {
    with(|sim| sim.config.faults.len())
}

/// How often `name` was called since the last reset.
///
/// # Safety
/// The text ends with zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simcuda_calls(name: *const c_char) -> u64 {
    with(|sim| sim.counts.get(text(name)).copied().unwrap_or(0))
}

/// The calls since the last reset as lines of name and code; then lines of `!` and what work complained
/// about. Writes what fits, returns the length of all.
///
/// # Safety
/// `len` bytes can be written at `place`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simcuda_log(place: *mut u8, len: usize) -> usize {
    let lines = |sim: &mut Sim| {
        let calls = sim
            .log
            .iter()
            .map(|(name, code)| format!("{name} {code}\n"));
        let complaints = sim.complaints.iter().map(|text| format!("! {text}\n"));
        calls.chain(complaints).collect::<String>()
    };
    copy_out(&with(lines), place, len)
}

/// How much of `kind` is held: `bytes`, `pinned`, `pages`, `ranges`, `streams`, `events` or `graphs`.
///
/// # Safety
/// The text ends with zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simcuda_held(kind: *const c_char) -> usize {
    with(|sim| match text(kind) {
        "bytes" => sim.memory.used,
        "pinned" => sim.memory.pinned_count(),
        "pages" => sim.pages.live(),
        "ranges" => sim.pages.reserved(),
        "streams" => sim
            .streams
            .values()
            .filter(|stream| !stream.is_destroyed)
            .count(),
        "events" => sim.events.len(),
        "graphs" => sim.graphs.len() + sim.executables.len(),
        _ => usize::MAX,
    })
}
