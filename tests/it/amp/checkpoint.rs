//! Trainings in files: taken up again to the bit, refused whole, put back whole when the driver fails.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use std::path::PathBuf;
use std::sync::Arc;

use crate::support::amp::boxed::Boxed;
use crate::support::device::device;
use crate::support::process::test_name;
use kitsune::amp::fp8::{Fp8Config, Fp8Scaler};
use kitsune::amp::{AmpConfig, AmpOptimizer, AmpOptimizerState, AppliedSteps, GradScaler};
use kitsune::checkpoint::Checkpoint;
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{
    AdamW, AdamWConfig, Decay, Ema, Optimizer, OptimizerId, Parameter, Schedule, Sgd, SgdConfig,
    StepInputs,
};
use kitsune::{Context, DType, Device, Error, HostConfig, HostTensor, Result, Tensor};

/// The optimizers of this library, as one type.
type Any = Box<dyn Optimizer>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    Momentum,
    AdamW,
}

/// What is trained; the fields are what a file must agree with.
#[derive(Clone, Debug)]
struct Setting {
    kind: Kind,
    dtype: DType,
    shapes: Vec<(&'static str, Vec<usize>)>,
    ema: bool,
    schedule: bool,
}

impl Setting {
    fn new(kind: Kind, dtype: DType) -> Self {
        Self {
            kind,
            dtype,
            shapes: vec![("layer.weight", vec![3, 5]), ("layer.bias", vec![5])],
            ema: true,
            schedule: true,
        }
    }
}

struct Training {
    parameters: Vec<Parameter>,
    optimizer: AmpOptimizer<Boxed>,
    step: u32,
}

fn optimizer(kind: Kind, parameters: &[Parameter]) -> Any {
    let config = SgdConfig {
        learning_rate: 0.05,
        momentum: if kind == Kind::Momentum { 0.9 } else { 0.0 },
        ..SgdConfig::default()
    };
    // Wide enough to move weights of 16 bits.
    let adamw = AdamWConfig {
        learning_rate: 0.05,
        ..AdamWConfig::default()
    };
    match kind {
        Kind::AdamW => Box::new(AdamW::new(parameters.to_vec(), adamw).unwrap()),
        _ => Box::new(Sgd::new(parameters.to_vec(), config).unwrap()),
    }
}

impl Training {
    fn new(context: &Context, setting: &Setting) -> Self {
        let parameter = |(name, shape): &(&'static str, Vec<usize>)| {
            let value = Tensor::full(context, &shape[..], setting.dtype, 0.5).unwrap();
            Parameter::new(*name, value).unwrap()
        };
        let parameters: Vec<_> = setting.shapes.iter().map(parameter).collect();
        let config = AmpConfig {
            init_scale: 1024.0,
            growth_interval: 2,
            ..AmpConfig::default()
        };
        let optimizer = Boxed(optimizer(setting.kind, &parameters));
        let mut joined = AmpOptimizer::new(optimizer, config).unwrap();
        if setting.ema {
            joined = joined.with_ema(0.9).unwrap();
        }
        if setting.schedule {
            let decay = Decay::Linear {
                steps: 20,
                floor: 0.0,
            };
            joined = joined.with_schedule(Schedule { warmup: 3, decay }).unwrap();
        }
        Self {
            parameters,
            optimizer: joined,
            step: 0,
        }
    }

    /// One step with gradients that its number gives; every third overflows.
    fn step(&mut self) {
        self.step += 1;
        for (index, parameter) in self.parameters.iter().enumerate() {
            let value = parameter.value();
            let mut numbers: Vec<f32> = (0..value.len())
                .map(|place| (place as f32 * 0.37 + index as f32 + self.step as f32).sin())
                .collect();
            if self.step % 3 == 2 {
                numbers[1] = f32::NAN;
            }
            let grad = Tensor::from_slice(value.context(), value.shape(), &numbers).unwrap();
            let scaled = self.optimizer.scaler().scale(&grad).unwrap();
            self.optimizer.accumulate(parameter, scaled).unwrap();
        }
        let _ = self.optimizer.step().unwrap();
        self.optimizer.zero_grad();
    }

    /// Everything, to the bit.
    fn state(&self) -> (Vec<HostTensor>, AmpOptimizerState) {
        let values = self
            .parameters
            .iter()
            .map(|parameter| parameter.value().to_host().unwrap());
        (values.collect(), self.optimizer.state_dict().unwrap())
    }

    fn save(&self) -> Checkpoint {
        let mut saved = Checkpoint::new();
        saved.add_model(&self.parameters).unwrap();
        saved.add_amp_optimizer(&self.optimizer).unwrap();
        saved.add_extra("step", &self.step).unwrap();
        saved
    }

    fn load(&mut self, saved: &Checkpoint) -> Result<()> {
        let step = saved.extra("step")?;
        let restore = saved.restore().model(&self.parameters)?;
        restore.amp_optimizer(&mut self.optimizer)?.finish()?;
        self.step = step;
        Ok(())
    }
}

/// A place of the test called `name`.
fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("kitsune-{}-checkpoint-{name}", std::process::id()))
}

#[test]
fn a_training_goes_on_from_a_file_to_the_bit() {
    let path = path("goes-on");
    for kind in [Kind::Plain, Kind::Momentum, Kind::AdamW] {
        for dtype in [DType::F16, DType::Bf16, DType::F32, DType::F64] {
            let (context, setting) = (support::amp::context(), Setting::new(kind, dtype));
            let mut through = Training::new(&context, &setting);
            // The step before the stop is skipped, and so is the second after it.
            (0..11).for_each(|_| through.step());
            through.save().write(&path).unwrap();
            let at_stop = through.state();
            (0..9).for_each(|_| through.step());

            let mut again = Training::new(&support::amp::context(), &setting);
            again.load(&Checkpoint::read(&path).unwrap()).unwrap();
            assert_eq!(again.state(), at_stop, "{setting:?}");
            (0..9).for_each(|_| again.step());
            assert_eq!(again.state(), through.state(), "{setting:?}");
            assert_ne!(through.state().0, at_stop.0);
        }
    }
    std::fs::remove_file(&path).unwrap();
}

/// The key and the reason of a refusal.
fn refused<T: std::fmt::Debug>(outcome: Result<T>) -> (String, String) {
    match outcome {
        Err(Error::InvalidState { key, reason }) => (key, reason),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_does_not_fit_is_named_and_changes_nothing() {
    let context = support::amp::context();
    let setting = Setting::new(Kind::Momentum, DType::F32);
    let mut training = Training::new(&context, &setting);
    (0..4).for_each(|_| training.step());
    let saved = training.save();
    let differing = |change: &dyn Fn(&mut Setting)| {
        let mut other = setting.clone();
        change(&mut other);
        let mut other = Training::new(&context, &other);
        other.step();
        let before = other.state();
        let (key, reason) = refused(other.load(&saved));
        assert_eq!(other.state(), before, "{key}: {reason}");
        key
    };
    assert_eq!(
        differing(&|other| other.dtype = DType::F64),
        "model/layer.weight"
    );
    assert_eq!(
        differing(&|other| other.shapes[1].1 = vec![1, 5]),
        "model/layer.bias"
    );
    assert_eq!(differing(&|other| other.shapes[0].0 = "head"), "model/head");
    assert_eq!(
        differing(&|other| other.shapes.truncate(1)),
        "model/layer.bias"
    );
    assert_eq!(
        differing(&|other| other.shapes.push(("more", vec![2]))),
        "model/more"
    );
    assert_eq!(
        differing(&|other| other.kind = Kind::AdamW),
        "optimizer/settings"
    );
    assert_eq!(
        differing(&|other| other.kind = Kind::Plain),
        "optimizer/layer.bias/momentum"
    );
    assert_eq!(differing(&|other| other.ema = false), "ema");
    assert_eq!(differing(&|other| other.schedule = false), "schedule");

    // The order of the parameters is no difference.
    let mut reversed = setting.clone();
    reversed.shapes.reverse();
    let mut reversed = Training::new(&context, &reversed);
    reversed.load(&saved).unwrap();
    assert_eq!(reversed.state().1, {
        let mut state = training.state().1;
        state.optimizer.groups[0].parameters.reverse();
        state
    });
}

#[test]
fn each_part_is_taken_once_and_none_is_forgotten() {
    let context = support::amp::context();
    let mut training = Training::new(&context, &Setting::new(Kind::Plain, DType::F32));
    training.step();
    let saved = training.save();
    let parameters = training.parameters.clone();
    let model = || saved.restore().model(&parameters).unwrap();
    assert_eq!(refused(model().finish()).0, "ema");
    assert_eq!(refused(model().model(&parameters)).1, "is restored twice");
    assert_eq!(refused(model().ignore("nothing")).0, "nothing");
    let others: Vec<_> = saved.parts().filter(|part| *part != "model").collect();
    assert_eq!(others, ["ema", "optimizer", "scaler", "schedule"]);
    let alone = others
        .into_iter()
        .try_fold(model(), |restore, part| restore.ignore(part));
    alone.unwrap().finish().unwrap();

    let mut twice = Checkpoint::new();
    twice.add_model(&parameters).unwrap();
    assert_eq!(refused(twice.add_model(&parameters)).0, "model");
    let same = [parameters[0].clone(), parameters[0].clone()];
    assert_eq!(
        refused(Checkpoint::new().add_model(&same)).0,
        "model/layer.weight"
    );
    for name in ["", "a/b", "extra"] {
        let optimizer = training.optimizer.optimizer();
        assert_eq!(refused(twice.add_optimizer(name, optimizer)).0, "part");
    }
    twice.add_extra("x", &1).unwrap();
    assert_eq!(refused(twice.add_extra("x", &1)).0, "x");
    // JSON would hold nothing in its place.
    let (key, reason) = refused(twice.add_extra("best loss", &f64::INFINITY));
    assert_eq!(key, "best loss");
    assert!(reason.contains("JSON has no inf"), "{reason}");
    assert_eq!(refused(twice.extra::<String>("x")).0, "x");
    assert_eq!(refused(twice.extra::<u32>("y")).0, "y");
    assert_eq!(twice.extra::<u32>("x").unwrap(), 1);
}

/// An optimizer that reports settings of any value.
struct Loose(OptimizerId, Vec<Parameter>, f64);

impl Optimizer for Loose {
    fn id(&self) -> &OptimizerId {
        &self.0
    }
    fn parameters(&self) -> &[Parameter] {
        &self.1
    }
    fn step(&mut self, _: &StepInputs) -> Result<()> {
        Ok(())
    }
    fn settings(&self, _: usize) -> Vec<(&'static str, f64)> {
        let sgd = Sgd::new(self.1.clone(), SgdConfig::default()).unwrap();
        let mut settings = sgd.settings(0);
        settings[0].1 = self.2;
        settings
    }
}

#[test]
fn a_setting_that_is_refused_takes_the_others_back() {
    let context = support::amp::context();
    let parameter = |name: &str| support::amp::parameter(&context, name, &[1f32, 2.0]);
    let new = |parameter: &Parameter, learning_rate| {
        let config = SgdConfig {
            learning_rate,
            ..SgdConfig::default()
        };
        Sgd::new(vec![parameter.clone()], config).unwrap()
    };
    let (one, two) = (parameter("one"), parameter("two"));
    let mut saved = Checkpoint::new();
    saved.add_model(&[one.clone(), two.clone()]).unwrap();
    saved.add_optimizer("first", &new(&one, 0.5)).unwrap();
    let loose = |value| Loose(OptimizerId::new(), vec![two.clone()], value);
    assert_eq!(
        refused(saved.add_optimizer("nan", &loose(f64::NAN))).0,
        "nan/learning_rate"
    );
    saved.add_optimizer("second", &loose(-1.0)).unwrap();

    one.value().fill(7.0).unwrap();
    let (mut first, mut second) = (new(&one, 0.25), new(&two, 0.125));
    let both = [one.clone(), two.clone()];
    let restore = saved.restore().model(&both).unwrap();
    let restore = restore.optimizer("first", &mut first).unwrap();
    let restore = restore.optimizer("second", &mut second).unwrap();
    let (key, reason) = refused(restore.finish());
    assert_eq!(key, "learning_rate", "{reason}");
    assert_eq!(first.config().learning_rate, 0.25);
    assert_eq!(second.config().learning_rate, 0.125);
    assert_eq!(support::amp::value::<f32>(&one), [7.0, 7.0]);
}

#[test]
fn whichever_driver_call_fails_all_is_loaded_or_nothing() {
    let inner = device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
    let setting = Setting::new(Kind::AdamW, DType::F16);
    let mut source = Training::new(&context, &setting);
    (0..5).for_each(|_| source.step());
    let (saved, loaded) = (source.save(), source.state());
    let mut training = Training::new(&context, &setting);
    training.step();
    let (before, saved_before) = (training.state(), training.save());
    let mut failures = 0;
    for nth in 1.. {
        faults.fail_nth(None, nth);
        let outcome = training.load(&saved);
        if faults.disarm() > 0 {
            outcome.unwrap();
            break;
        }
        match outcome {
            Err(Error::Driver { .. }) => failures += 1,
            // Of an event that was let go of afterwards.
            Ok(()) => {
                assert_eq!(training.state(), loaded, "call {nth}");
                training.load(&saved_before).unwrap();
            }
            other => panic!("call {nth}: {other:?}"),
        }
        assert_eq!(training.state(), before, "call {nth}");
    }
    assert!(
        failures > 20,
        "a read and a write for each tensor: {failures}"
    );
    assert_eq!(training.state(), loaded);
}

#[test]
fn a_scaler_is_loaded_whole_or_not_at_all() {
    let inner = device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
    let config = AmpConfig {
        init_scale: 8.0,
        growth_factor: 4.0,
        ..AmpConfig::default()
    };
    let saved = GradScaler::new(&context, config)
        .unwrap()
        .state_dict()
        .unwrap();
    let mut scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
    let before = scaler.state_dict().unwrap();
    let mut failures = 0;
    for nth in 1.. {
        faults.fail_nth(None, nth);
        let outcome = scaler.load_state_dict(&saved);
        if faults.disarm() > 0 {
            outcome.unwrap();
            break;
        }
        outcome.unwrap_err();
        assert_eq!(scaler.state_dict().unwrap(), before, "call {nth}");
        // The inverse, too: it is what divides.
        let inverse = scaler.scale(&Tensor::full(&context, [], DType::F32, 1.0).unwrap());
        assert_eq!(inverse.unwrap().item::<f32>().unwrap(), 65536.0);
        failures += 1;
    }
    assert!(failures >= 12, "{failures}");
    assert_eq!(scaler.state_dict().unwrap(), saved);
}

#[test]
fn files_that_are_none_are_refused_in_one_line() {
    let path = path("none");
    let told = |outcome: Result<Checkpoint>| outcome.unwrap_err().to_string();
    assert!(told(Checkpoint::read(&path)).starts_with("cannot read "));
    assert!(told(Checkpoint::read(std::env::temp_dir())).contains("not a regular file"));
    std::fs::write(&path, b"PK\x03\x04 this is another kind of file").unwrap();
    assert!(told(Checkpoint::read(&path)).starts_with("invalid saved state: header: "));
    std::fs::write(&path, b"").unwrap();
    assert!(told(Checkpoint::read(&path)).starts_with("invalid saved state: file: "));
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn parts_can_be_saved_one_by_one() {
    let context = support::amp::context();
    let weight = support::amp::ones::<f32>(&context, "w", &[2.0, f32::INFINITY]);
    let mut optimizer = support::amp::sgd(&[&weight], 0.5);
    let mut scaler = support::amp::scaler(&context, 4.0);
    let mut ema = Ema::new(std::slice::from_ref(&weight), 0.5).unwrap();
    let mut applied = AppliedSteps::new();
    let _ = scaler.step(&mut optimizer).unwrap();
    applied.record(scaler.found_inf(&optimizer)).unwrap();
    ema.update(scaler.found_inf(&optimizer)).unwrap();
    scaler.update().unwrap();
    let mut saved = Checkpoint::new();
    saved.add_scaler(&scaler).unwrap();
    saved.add_ema(&ema).unwrap();
    saved.add_applied_steps(&applied).unwrap();
    saved.add_optimizer("sgd", &optimizer).unwrap();
    let path = path("parts");
    saved.write(&path).unwrap();

    weight.value().fill(-3.0).unwrap();
    let mut other = support::amp::scaler(&context, 1024.0);
    let mut averages = Ema::new(std::slice::from_ref(&weight), 0.75).unwrap();
    let mut count = AppliedSteps::new();
    let mut sgd = support::amp::sgd(&[&weight], 0.25);
    let read = Checkpoint::read(&path).unwrap();
    assert_eq!(read, saved);
    let restore = read.restore().scaler(&mut other).unwrap();
    let restore = restore.ema(&mut averages).unwrap();
    let restore = restore.applied_steps(&mut count).unwrap();
    restore
        .optimizer("sgd", &mut sgd)
        .unwrap()
        .finish()
        .unwrap();
    assert_eq!(other.get_scale().unwrap(), 2.0);
    assert_eq!(averages.state_dict().unwrap(), ema.state_dict().unwrap());
    assert_eq!((count.steps(), count.exact().unwrap()), (1, 0));
    assert_eq!(sgd.config().learning_rate, 0.5);
    std::fs::remove_file(&path).unwrap();

    let tensors = [("x", DType::F8E4M3)];
    let fp8 = |x: f64| {
        let mut fp8 = Fp8Scaler::new(&context, Fp8Config::default(), &tensors).unwrap();
        let x = Tensor::full(&context, [4], DType::F32, x).unwrap();
        drop(fp8.quantize("x", &x).unwrap());
        fp8.update().unwrap();
        fp8
    };
    let (of_two, mut of_three) = (fp8(2.0), fp8(3.0));
    let mut scales = Checkpoint::new();
    scales.add_fp8_scaler("fp8", &of_two).unwrap();
    let restore = scales.restore().fp8_scaler("fp8", &mut of_three);
    restore.unwrap().finish().unwrap();
    assert_eq!(of_three.state_dict().unwrap(), of_two.state_dict().unwrap());

    // A scaler that is off has no state, and takes none; one that is on needs some.
    let off = AmpConfig {
        enabled: false,
        ..AmpConfig::default()
    };
    let mut off = GradScaler::new(&context, off).unwrap();
    let mut empty = Checkpoint::new();
    empty.add_scaler(&off).unwrap();
    empty.restore().scaler(&mut off).unwrap().finish().unwrap();
    assert_eq!(
        refused(empty.restore().scaler(&mut other)).0,
        "scaler/scale"
    );
}

/// Says to the test below that it runs where files may have no more than 16 KiB, and where its file is.
const SMALL_DISK: &str = "KITSUNE_TEST_SMALL_DISK";

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_the_old_file_and_no_other() {
    let checkpoint = |elements: usize| {
        let mut saved = Checkpoint::new();
        let tensor = HostTensor::from_slice([elements], &vec![1f32; elements]).unwrap();
        saved.add_extra_tensor("large", tensor).unwrap();
        saved
    };
    if let Some(path) = std::env::var_os(SMALL_DISK) {
        let error = checkpoint(1 << 20).write(path).unwrap_err();
        assert!(error.to_string().contains("File too large"), "{error}");
        return;
    }
    let folder = path("small-disk");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir(&folder).unwrap();
    let path = folder.join("state");
    checkpoint(10).write(&path).unwrap();
    // With the signal ignored, writes past the limit fail as they do on a full disk: in the middle.
    let script = "trap '' XFSZ; ulimit -f 32; exec \"$0\" \"$1\"";
    let outcome = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .arg(test_name!("a_full_disk_leaves_the_old_file_and_no_other"))
        .env(SMALL_DISK, &path)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&outcome.stdout);
    assert!(
        outcome.status.success() && told.contains("1 passed"),
        "{outcome:?}"
    );
    assert_eq!(Checkpoint::read(&path).unwrap(), checkpoint(10));
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    std::fs::remove_dir_all(&folder).unwrap();
}
