//! Saves and resumes training runs: what is saved in addition to the network, and which flags must match on resume.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use kitsune::DType;
use kitsune::amp::AmpOptimizer;
use kitsune::checkpoint::Checkpoint;
use kitsune::optim::AdamW;
use serde::{Deserialize, Serialize};

use super::task::Task;
use crate::args::{Model, TrainArgs};
use crate::failure::{Failure, warn};
use crate::fingerprint::Fingerprint;

/// The placeholder for the number of steps in a file name.
const STEP: &str = "{step}";

/// Key of the data's fingerprint in a file. Files of earlier versions have none.
const FINGERPRINT: &str = "data_fingerprint";

/// The saved run that was resumed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resumed {
    /// Steps it had done.
    pub(super) steps: u64,
    /// Whether it was trained on different data; `None` if the file does not say.
    pub(super) data_changed: Option<bool>,
}

/// The flags that identify a run, and how many steps it has done. The clip and the number of steps are not included,
/// because they may change on resume.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    steps_done: u64,
    model: Model,
    dtype: DType,
    seed: u64,
    batch_size: Option<u32>,
    accumulate: u32,
    learning_rate: Option<f32>,
}

impl Run {
    fn of(args: &TrainArgs, steps_done: u64) -> Self {
        Self {
            steps_done,
            model: args.model,
            dtype: args.dtype,
            seed: args.seed,
            batch_size: args.batch_size,
            accumulate: args.accumulate,
            learning_rate: args.learning_rate,
        }
    }
}

/// Refuses a path that cannot be written, before any training. Checks the name of the last file, which is the longest
/// if the name contains the number of steps.
pub(super) fn check_place(path: &Path, steps: u64) -> Result<(), Failure> {
    let refuse = |reason: &str| {
        let reason = format!("--save {}: {reason}", path.display());
        Err(Failure::Input(reason))
    };
    let last = numbered(path, steps);
    match fs::metadata(&last) {
        Ok(about) if about.is_dir() => return refuse("is a directory"),
        Ok(about) if !about.is_file() => return refuse("not a regular file"),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return refuse(&error.to_string()),
    }
    let parent = match last.parent() {
        None => return refuse("not a file name"),
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
    };
    if !parent.is_dir() {
        return refuse("no such directory");
    }
    // The most reliable way to find out whether a file can be created here is to create one.
    let trial = parent.join(format!(".kitsune.{}.tmp", std::process::id()));
    match File::create(&trial).and_then(|_| fs::remove_file(&trial)) {
        Ok(()) => Ok(()),
        Err(error) => refuse(&error.to_string()),
    }
}

/// Writes the state of the run after step `step`.
pub(super) fn save(
    path: &Path,
    step: u64,
    args: &TrainArgs,
    task: &dyn Task,
    optimizer: &AmpOptimizer<AdamW>,
) -> kitsune::Result<()> {
    let mut saved = Checkpoint::new();
    saved.add_model(&task.parameters())?;
    saved.add_amp_optimizer(optimizer)?;
    saved.add_extra("run", &Run::of(args, step))?;
    saved.add_extra("data", &task.place())?;
    saved.add_extra(FINGERPRINT, &task.fingerprint())?;
    saved.write(numbered(path, step))
}

/// Resumes from the file at `path`. Warns if the data has changed since.
pub(super) fn resume(
    path: &Path,
    args: &TrainArgs,
    task: &mut dyn Task,
    optimizer: &mut AmpOptimizer<AdamW>,
) -> Result<Resumed, Failure> {
    let refuse = |reason: String| Failure::Input(format!("--resume {}: {reason}", path.display()));
    let refused = |error: kitsune::Error| match &error {
        kitsune::Error::File { .. } | kitsune::Error::InvalidState { .. } => {
            refuse(error.to_string())
        }
        _ => error.into(),
    };
    let saved = Checkpoint::read(path).map_err(refused)?;
    let run: Run = saved.extra("run").map_err(refused)?;
    let here = Run::of(args, run.steps_done);
    if run != here {
        return Err(refuse(format!(
            "belongs to another run: {}",
            differences(&run, &here)
        )));
    }
    if run.steps_done >= args.steps {
        let reason = format!(
            "already at step {}, with --steps {}",
            run.steps_done, args.steps
        );
        return Err(refuse(reason));
    }
    let place = saved.extra("data").map_err(refused)?;
    let fits = task
        .go_to(place)
        .map_err(|reason| refuse(format!("data: {reason}")))?;
    let fingerprint = saved.extra::<Fingerprint>(FINGERPRINT).ok();
    let data_changed = if fits {
        fingerprint.map(|fingerprint| fingerprint != task.fingerprint())
    } else {
        Some(true)
    };
    let parameters = task.parameters();
    // A larger --steps changes the schedule, so keep the new settings; the schedule continues from the saved position.
    let restore = saved.restore().keeping_settings(["schedule"]);
    let restore = restore.model(&parameters);
    let restore = restore.and_then(|restore| restore.amp_optimizer(optimizer));
    let restored = restore.and_then(|restore| restore.finish());
    restored.map_err(|error| match refused(error) {
        // A text with different characters needs a different network.
        Failure::Input(reason) if data_changed == Some(true) => {
            Failure::Input(format!("{reason} (the data has changed since)"))
        }
        failure => failure,
    })?;
    if data_changed == Some(true) {
        let path = path.display();
        warn(&format!(
            "--resume {path}: the data has changed since this was saved; continuing with the new data"
        ));
    }
    let steps = run.steps_done;
    Ok(Resumed {
        steps,
        data_changed,
    })
}

/// The flags in which two runs differ, with the saved and the given values.
fn differences(saved: &Run, here: &Run) -> String {
    let flags = |run: &Run| {
        let none = || "not given".to_owned();
        let rate = run.learning_rate.map_or_else(none, |rate| rate.to_string());
        let size = run.batch_size.map_or_else(none, |size| size.to_string());
        let model = match run.model {
            Model::Mlp => "mlp",
            Model::Gpt => "gpt",
        };
        [
            ("--model", model.to_owned()),
            ("--dtype", run.dtype.to_string()),
            ("--seed", run.seed.to_string()),
            ("--batch-size", size),
            ("--accumulate", run.accumulate.to_string()),
            ("--learning-rate", rate),
        ]
    };
    let pairs = flags(saved).into_iter().zip(flags(here));
    let differing = pairs.filter(|(saved, here)| saved != here);
    let told = differing.map(|((flag, saved), (_, here))| format!("{flag} was {saved}, is {here}"));
    told.collect::<Vec<_>>().join("; ")
}

/// `path` with the placeholder replaced by the number of steps.
fn numbered(path: &Path, step: u64) -> PathBuf {
    match path.to_str() {
        Some(text) => PathBuf::from(text.replace(STEP, &step.to_string())),
        None => path.to_owned(),
    }
}
