//! Parses the command line, and refuses invalid input before anything runs.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{
    Arg, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint, value_parser,
};
use kitsune::{DType, Device, HostConfig};
use serde::{Deserialize, Serialize};

use crate::churn::ChurnArgs;
use crate::failure::Failure;
use crate::replay::ReplayArgs;

const STEPS_MAX: u64 = 10_000_000;

/// Memory and mixed-precision runtime for trainers.
#[derive(Debug, Parser)]
#[command(name = "kitsune", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a small network in mixed precision: a digit classifier or a language model.
    Train(TrainArgs),
    /// Replay recorded allocation traces on a pool and report memory, time and driver calls.
    Replay(ReplayArgs),
    /// Run a synthetic allocation workload on a pool and on the system's malloc.
    Churn(ChurnArgs),
    /// Report this machine's CUDA support, and which device would be used.
    Doctor(DoctorArgs),
}

/// Arguments of `kitsune doctor`.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Print the findings as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `kitsune train`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TrainArgs {
    /// Network to train.
    #[arg(long, value_enum, default_value_t = Model::Mlp)]
    pub(crate) model: Model,

    /// Element type of the matrix products; f16 uses loss scaling.
    #[arg(long, default_value = "f16", value_parser = dtype_parser())]
    pub(crate) dtype: DType,

    /// Training steps.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = value_parser!(u64).range(1..=STEPS_MAX))]
    pub(crate) steps: u64,

    /// Seed of the initial weights and of the order of the data.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Device to train on.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub(crate) device: DeviceChoice,

    /// Data to use instead of the built-in data. For mlp, one image per line: 64 pixels (0..=16) and the digit,
    /// comma-separated; for gpt, any text.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,

    /// Serve Prometheus metrics at http://ADDR/metrics during the run, for example 127.0.0.1:9100 or
    /// localhost:9100.
    #[arg(long, value_name = "ADDR", value_parser = parse_address)]
    pub(crate) metrics: Option<String>,

    /// Put an infinity into a gradient at this step (the first step is 1).
    #[arg(long, value_name = "STEP", value_parser = value_parser!(u64).range(1..))]
    pub(crate) inject_overflow: Option<u64>,

    /// Save a checkpoint to this file at the end; `{step}` in the name is replaced with the number of steps done.
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,

    /// Also save a checkpoint after every N steps.
    #[arg(long, value_name = "N", requires = "save", value_parser = value_parser!(u64).range(1..))]
    pub(crate) save_every: Option<u64>,

    /// Resume from a checkpoint, with the same flags, up to step --steps.
    #[arg(long, value_name = "FILE")]
    pub(crate) resume: Option<PathBuf>,

    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,

    /// Memory limit of the pool, for example 512MiB.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) limit: Option<u64>,

    /// Images (default 64) or sequences (default 8) per batch.
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    pub(crate) batch_size: Option<u32>,

    /// Batches whose gradients are accumulated for one step.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=1024))]
    pub(crate) accumulate: u32,

    /// Clip gradients to this norm; gpt clips to 1 by default.
    #[arg(long, value_name = "NORM", value_parser = parse_norm)]
    pub(crate) clip: Option<f32>,

    /// Initial learning rate, by default 0.01 (mlp) or 0.003 (gpt). It decays linearly to zero over the run; skipped
    /// steps do not count.
    #[arg(long, value_name = "X", value_parser = parse_learning_rate)]
    pub(crate) learning_rate: Option<f32>,
}

/// The networks that can be trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Model {
    /// Linear layers that classify handwritten digits.
    Mlp,
    /// A small transformer that predicts the next character of a text.
    Gpt,
}

/// The choices of `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceChoice {
    /// The first CUDA device if it can be used, else the host.
    Auto,
    /// The CPU and its memory.
    Host,
    /// The first CUDA device.
    Cuda,
}

impl DeviceChoice {
    /// Resolves `Auto`: the first CUDA device if it can be used, else the host.
    pub(crate) fn decided(self) -> Self {
        match self {
            Self::Auto if Device::why_not_cuda().is_none() => Self::Cuda,
            Self::Auto => Self::Host,
            chosen => chosen,
        }
    }

    /// Opens the device; `config` is for the host.
    pub(crate) fn open(self, config: HostConfig) -> kitsune::Result<Device> {
        match self.decided() {
            Self::Cuda => Device::cuda(0),
            _ => Device::host(config),
        }
    }
}

/// A parsed command line.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// Text to print: help or the version.
    Help(String),
    /// `kitsune train`.
    Train(Box<TrainArgs>),
    /// `kitsune replay`.
    Replay(Box<ReplayArgs>),
    /// `kitsune churn`.
    Churn(Box<ChurnArgs>),
    /// `kitsune doctor`.
    Doctor(DoctorArgs),
}

/// Parses `line`, whose first element is the program's name.
pub(crate) fn parse(line: impl IntoIterator<Item = OsString>) -> Result<Parsed, Failure> {
    let matches = command().try_get_matches_from(line);
    let args = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => match cli.command {
            Command::Train(args) => args,
            Command::Replay(args) => return Ok(Parsed::Replay(Box::new(args))),
            Command::Churn(args) => return Ok(Parsed::Churn(Box::new(args))),
            Command::Doctor(args) => return Ok(Parsed::Doctor(args)),
        },
        Err(error) => return understand(&error),
    };
    if let Some(step) = args.inject_overflow.filter(|step| *step > args.steps) {
        return Err(Failure::Input(format!(
            "--inject-overflow {step} is after the last step, {}",
            args.steps
        )));
    }
    Ok(Parsed::Train(Box::new(args)))
}

/// The definition of the command line. The argument after a flag that takes a value is its value even if it begins with
/// a hyphen, so that a negative number is refused as a number, not as an unknown flag. Flags that take files are an
/// exception, so that `--save --json` does not make a file called `--json`.
fn command() -> clap::Command {
    let takes_any = |arg: Arg| {
        let is_value = arg.get_long().is_some() && arg.get_action().takes_values();
        let is_file = arg.get_value_hint() == ValueHint::AnyPath;
        arg.allow_hyphen_values(is_value && !is_file)
    };
    Cli::command().mut_subcommands(|command| command.mut_args(takes_any))
}

/// Interprets an error of clap, which also reports help as an error, and spreads errors over several lines.
fn understand(error: &clap::Error) -> Result<Parsed, Failure> {
    let text = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Ok(Parsed::Help(text)),
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => Err(
            Failure::Input("no command given; see `kitsune --help`".to_owned()),
        ),
        _ => Err(Failure::Input(condensed(&text))),
    }
}

/// The lines of an error up to the usage, joined into one.
fn condensed(text: &str) -> String {
    let lines = text.lines().map(str::trim);
    let told = lines
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty());
    let line = told.collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    // The standard library's message for a sign or a decimal point.
    line.replace(
        "invalid digit found in string",
        "not a whole number, 0 or more",
    )
}

fn dtype_parser() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(["f16", "bf16", "f32"]).map(|name| {
        name.parse()
            .expect("each possible value is the name of a dtype")
    })
}

/// A byte count, with a unit (`KiB`, `MiB`, `GiB`, `TiB`) or plain.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_start() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => {
            return Err(
                "not a byte count: a whole number and B, KiB, MiB, GiB or TiB, such as 512MiB"
                    .to_owned(),
            );
        }
    };
    if number.is_empty() {
        return Err(
            "not a byte count: a whole number and B, KiB, MiB, GiB or TiB, such as 512MiB"
                .to_owned(),
        );
    }
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift));
    match bytes {
        None => Err("more bytes than can be addressed".to_owned()),
        Some(0) => Err("must be above 0".to_owned()),
        Some(bytes) => Ok(bytes),
    }
}

/// Checks that `text` is a host (name or IP address) and a port. The host is resolved only when it is used.
fn parse_address(text: &str) -> Result<String, String> {
    let is_address = text
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if is_address {
        Ok(text.to_owned())
    } else {
        Err("not an address and a port, such as 127.0.0.1:9100 or localhost:9100".to_owned())
    }
}

fn parse_norm(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(norm) if norm > 0.0 && norm.is_finite() => Ok(norm),
        Ok(_) => Err("not above 0 and finite".to_owned()),
        Err(_) => Err("not a number such as 1.5".to_owned()),
    }
}

fn parse_learning_rate(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(rate) if rate > 0.0 && rate <= 1.0 => Ok(rate),
        Ok(_) => Err("not above 0 and at most 1".to_owned()),
        Err(_) => Err("not a number such as 0.01".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Parsed, Failure> {
        parse(line.split(' ').map(OsString::from))
    }

    fn refusal(line: &str) -> String {
        match parsed(line) {
            Err(Failure::Input(message)) => message,
            other => panic!("`{line}` gave {other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn flags_are_understood() {
        let Ok(Parsed::Train(args)) = parsed("kitsune train --dtype bf16 --limit 2MiB --steps 7")
        else {
            panic!("a good line")
        };
        assert_eq!(
            (args.dtype, args.limit, args.steps),
            (DType::Bf16, Some(2 << 20), 7)
        );
        assert!(
            matches!(parsed("kitsune train --clip 1000"), Ok(Parsed::Train(args)) if args.clip == Some(1000.0))
        );
        assert!(
            matches!(parsed("kitsune --help"), Ok(Parsed::Help(text)) if text.contains("train"))
        );
        assert!(matches!(
            parsed("kitsune train --help"),
            Ok(Parsed::Help(_))
        ));
    }

    fn assert_refused(cases: &[(&str, &str)]) {
        for (line, reason) in cases {
            let message = refusal(line);
            assert!(message.contains(reason), "`{line}` said: {message}");
            assert!(
                !message.contains('\n') && !message.contains("Usage"),
                "{message}"
            );
        }
    }

    #[test]
    fn refusals_are_one_line_and_say_why() {
        assert_refused(&[
            ("kitsune", "no command"),
            ("kitsune tarin", "'tarin'"),
            (
                "kitsune train --dtype f8",
                "[possible values: f16, bf16, f32]",
            ),
            (
                "kitsune train --device gpu",
                "[possible values: auto, host, cuda]",
            ),
            ("kitsune train --steps 0", "0 is not in 1.."),
            (
                "kitsune train --steps 99999999999999999999",
                "number too large",
            ),
            (
                "kitsune train --seed 18446744073709551616",
                "number too large",
            ),
            (
                "kitsune train --steps 5 --steps 6",
                "cannot be used multiple times",
            ),
            (
                "kitsune train --step 5",
                "a similar argument exists: '--steps'",
            ),
            ("kitsune train --steps", "a value is required"),
            (
                "kitsune train --steps 5 --inject-overflow 6",
                "after the last step, 5",
            ),
            ("kitsune train --inject-overflow 0", "0 is not in 1.."),
            ("kitsune train --batch-size 0", "0 is not in 1.."),
            (
                "kitsune train --batch-size 2.5",
                "'--batch-size <N>': not a whole number",
            ),
            ("kitsune train --learning-rate NaN", "not above 0"),
            ("kitsune train --learning-rate inf", "not above 0"),
            ("kitsune train --learning-rate fast", "not a number"),
            ("kitsune train --clip 0", "not above 0"),
            ("kitsune train --clip NaN", "not above 0"),
            ("kitsune train --clip 1e39", "not above 0 and finite"),
            ("kitsune train --limit 0", "above 0"),
            ("kitsune train --limit 99999999TiB", "more bytes"),
            ("kitsune train --limit MiB", "not a byte count"),
            ("kitsune train --limit 1.5GiB", "not a byte count"),
            ("kitsune train --save-every 5", "--save <FILE>"),
            ("kitsune train --save x --save-every 0", "0 is not in 1.."),
        ]);
        for address in ["9100", ":9100", "localhost", "localhost:65536"] {
            let line = format!("kitsune train --metrics {address}");
            assert_refused(&[(&line, "not an address and a port")]);
        }
    }

    #[test]
    fn values_that_begin_with_a_hyphen_are_named_with_their_flag() {
        let of = |value, flag| format!("invalid value '{value}' for '--{flag}>': ");
        for (line, value, flag) in [
            ("train --steps -1", "-1", "steps <N"),
            ("train --seed -1", "-1", "seed <N"),
            ("train --accumulate -2", "-2", "accumulate <N"),
            ("train --learning-rate -1", "-1", "learning-rate <X"),
            ("train --clip -inf", "-inf", "clip <NORM"),
            ("train --limit -5MiB", "-5MiB", "limit <BYTES"),
            ("replay x --event-lag -1", "-1", "event-lag <N"),
            ("churn --workload hot --allocs -1", "-1", "allocs <N"),
        ] {
            assert_refused(&[(&format!("kitsune {line}"), &of(value, flag))]);
        }
        assert_refused(&[
            (
                "kitsune train --dtype -f16",
                "invalid value '-f16' for '--dtype <DTYPE>'",
            ),
            // `--json` is not taken as the file's name.
            ("kitsune train --save --json", "a value is required"),
        ]);
    }
}
