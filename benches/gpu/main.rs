//! What a CUDA device makes of the crate: kernels against the bandwidth of a copy, whole steps, the pool's hot path
//! and recorded runs beside other allocators, and the price of the driver calls that the pool's policy rests on.
//!
//! ```sh
//! cargo bench --all-features --bench gpu -- copies kernels steps pairs costs runs
//! ```
//!
//! Each figure is one JSON object on a line of its own, printed as soon as it is known: `part`, `name`, and numbers
//! whose names end in their unit. Work of the device is timed by its own events, work of the host by its clock;
//! a figure is the median of several repeats. `scripts/gpu/check` runs this and judges the figures.
//!
//! `--small` cuts every size down for a simulated device, on which no figure means anything. Without a CUDA
//! device a line says so.

#![allow(unsafe_code, reason = "raw driver calls are what is measured")]
#![allow(
    clippy::print_stdout,
    reason = "figures are the output of this program"
)]

#[cfg(target_os = "linux")]
mod clock;
#[cfg(target_os = "linux")]
mod copies;
#[cfg(target_os = "linux")]
mod costs;
#[cfg(target_os = "linux")]
mod cuda;
#[cfg(target_os = "linux")]
mod kernels;
#[cfg(target_os = "linux")]
mod pairs;
#[cfg(target_os = "linux")]
mod peers;
#[cfg(target_os = "linux")]
mod program;
#[cfg(target_os = "linux")]
mod runs;
#[cfg(target_os = "linux")]
mod setting;
#[cfg(target_os = "linux")]
mod steps;

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("passed over: the driver is looked for on Linux only");
}

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    use std::process::ExitCode;

    use setting::{Setting, Words};

    let words = match Words::parse(std::env::args().skip(1)) {
        Ok(words) => words,
        Err(unknown) => {
            eprintln!(
                "no part `{unknown}`; known are {}",
                PARTS.map(|part| part.0).join(", ")
            );
            return ExitCode::from(2);
        }
    };
    if words.is_smoke {
        return ExitCode::SUCCESS;
    }
    let setting = match Setting::open(&words) {
        Ok(setting) => setting,
        Err(error) => {
            println!("passed over: {error}");
            let required = std::env::var("REQUIRE_GPU").is_ok_and(|value| value == "1");
            return ExitCode::from(u8::from(required));
        }
    };
    let mut failed = false;
    for (name, run) in PARTS.iter().filter(|(name, _)| words.asks_for(name)) {
        if let Err(error) = run(&setting) {
            eprintln!("{name}: {error}");
            failed = true;
        }
    }
    ExitCode::from(u8::from(failed))
}

/// A part by its name.
#[cfg(target_os = "linux")]
type Part = (&'static str, fn(&setting::Setting) -> kitsune::Result<()>);

#[cfg(target_os = "linux")]
const PARTS: [Part; 6] = [
    ("copies", copies::run),
    ("kernels", kernels::run),
    ("pairs", pairs::run),
    ("costs", costs::run),
    ("steps", steps::run),
    ("runs", runs::run),
];
