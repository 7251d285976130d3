//! What a training is after a restoration: files of version 1, windows of accumulation, and master weights of
//! parameters that someone wrote.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    unsafe_code,
    reason = "graphs are launched while what they use is alive"
)]

use crate::support;
use std::sync::Arc;

use crate::support::amp::{context, parameter, set_grad, tensor, value};
use kitsune::amp::{AmpConfig, AmpOptimizer, GradScaler};
use kitsune::checkpoint::Checkpoint;
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{
    AdamW, AdamWConfig, Decay, Ema, MasterWeights, Optimizer, ParamGroup, Parameter, Schedule, Sgd,
    SgdConfig, StepInputs,
};
use kitsune::{Context, DType, Device, Error, HostConfig, HostTensor, Result, Tensor, bf16};

/// The key and the reason of a refusal.
fn refused<T: std::fmt::Debug>(outcome: Result<T>) -> (String, String) {
    match outcome {
        Err(Error::InvalidState { key, reason }) => (key, reason),
        other => panic!("not refused: {other:?}"),
    }
}

fn file(name: &str) -> Checkpoint {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");
    Checkpoint::read(format!("{folder}/{name}.safetensors")).unwrap()
}

/// What the file `checkpoint-1-amp` was saved from, before its first step.
fn joined(context: &Context) -> (Vec<Parameter>, AmpOptimizer<Sgd>) {
    let full = |name: &str, dtype, value| {
        Parameter::new(name, Tensor::full(context, [2], dtype, value).unwrap()).unwrap()
    };
    let parameters = vec![
        full("layer.weight", DType::Bf16, 1.0),
        full("layer.bias", DType::F32, 2.0),
    ];
    let config = SgdConfig {
        learning_rate: 0.5,
        momentum: 0.5,
        nesterov: true,
        ..SgdConfig::default()
    };
    let of_bias = SgdConfig {
        learning_rate: 0.25,
        ..config
    };
    let groups = vec![
        ParamGroup::new(vec![parameters[0].clone()], config),
        ParamGroup::new(vec![parameters[1].clone()], of_bias),
    ];
    let amp = AmpConfig {
        init_scale: 1024.0,
        ..AmpConfig::default()
    };
    let decay = Decay::Linear {
        steps: 8,
        floor: 0.5,
    };
    let optimizer = AmpOptimizer::new(Sgd::with_groups(groups).unwrap(), amp).unwrap();
    let optimizer = optimizer.with_clip(64.0).unwrap();
    let optimizer = optimizer
        .with_schedule(Schedule { warmup: 2, decay })
        .unwrap();
    (parameters, optimizer.with_ema(0.5).unwrap())
}

fn step(parameters: &[Parameter], optimizer: &mut AmpOptimizer<Sgd>) {
    for one in parameters {
        let grad = Tensor::full(one.value().context(), [2], DType::F32, 0.5).unwrap();
        let grad = optimizer.scaler().scale(&grad).unwrap();
        optimizer.accumulate(one, grad).unwrap();
    }
    let _ = optimizer.step().unwrap();
    optimizer.zero_grad();
}

fn state(parameters: &[Parameter], optimizer: &AmpOptimizer<Sgd>) -> Checkpoint {
    let mut saved = Checkpoint::new();
    saved.add_model(parameters).unwrap();
    saved.add_amp_optimizer(optimizer).unwrap();
    saved
}

#[test]
fn a_file_of_version_1_goes_on_and_what_it_lacks_is_listed() {
    let old = file("checkpoint-1-amp");
    let context = context();
    let (parameters, mut optimizer) = joined(&context);
    let restore = old.restore().model(&parameters).unwrap();
    let restore = restore.amp_optimizer(&mut optimizer).unwrap();
    for what in [
        "optimizer/rule",
        "optimizer/flags",
        "optimizer/clip",
        "schedule/form",
    ] {
        assert!(restore.lacks().iter().any(|one| one == what), "{what}");
    }
    restore.finish().unwrap();
    // Two steps with the gradient 0.5: 0.125 · 0.75 and 0.25 · 0.875 off.
    assert_eq!(value::<f32>(&parameters[1]), [1.6875; 2]);
    let (through, mut reference) = joined(&context);
    for _ in 0..2 {
        step(&through, &mut reference);
    }
    assert_eq!(state(&parameters, &optimizer), state(&through, &reference));
    for _ in 0..3 {
        step(&parameters, &mut optimizer);
        step(&through, &mut reference);
    }
    assert_eq!(state(&parameters, &optimizer), state(&through, &reference));

    // Written again it is a file of version 2, which lacks nothing of this.
    let again = state(&parameters, &optimizer);
    let restore = again.restore().model(&parameters).unwrap();
    let restore = restore.amp_optimizer(&mut optimizer).unwrap();
    assert!(restore.lacks().is_empty(), "{:?}", restore.lacks());
}

#[test]
fn parts_of_version_1_are_read_one_by_one() {
    let old = file("checkpoint-1");
    assert_eq!(old.extra::<u32>("epoch").unwrap(), 3);
    let context = context();
    let parameters = [
        parameter(&context, "a", &[0f32; 2]),
        parameter(&context, "b", &[bf16::ZERO; 2]),
    ];
    let mut adamw = AdamW::new(parameters.to_vec(), AdamWConfig::default()).unwrap();
    let amp = AmpConfig::default();
    let mut scaler = GradScaler::new(&context, amp).unwrap();
    let restore = old.restore().model(&parameters).unwrap();
    let restore = restore.optimizer("optimizer", &mut adamw).unwrap();
    let restore = restore.scaler(&mut scaler).unwrap();
    assert_eq!(restore.lacks()[..2], ["optimizer/rule", "optimizer/flags"]);
    restore.finish().unwrap();
    assert_eq!(adamw.config().learning_rate, 0.25);
    assert_eq!(adamw.step_counts().to_vec::<u32>().unwrap(), [1, 1]);
    assert_eq!(scaler.scale_factor().unwrap(), 512.0);
    let moment = adamw.first_moment(1).unwrap().to_host().unwrap();
    assert_eq!(Some(&moment), old.tensor("optimizer", "b/first_moment"));
    let saved = old.tensor("model", "a").unwrap();
    assert_eq!(&parameters[0].value().to_host().unwrap(), saved);
}

#[test]
fn a_checkpoint_within_a_window_of_accumulation_is_refused() {
    let context = context();
    let new = |name: &str| parameter(&context, name, &[0f32]);
    let one = |value: f32| tensor(&context, &[value]);
    let (first, second) = (new("first"), new("second"));
    let both = vec![first.clone(), second.clone()];
    let mut sgd = Sgd::new(both.clone(), SgdConfig::default()).unwrap();
    let save = |sgd: &Sgd| {
        let mut saved = Checkpoint::new();
        saved.add_model(&both)?;
        saved.add_optimizer("optimizer", sgd)
    };
    save(&sgd).unwrap();
    first.accumulate_grad(one(1.0)).unwrap();
    second.accumulate_grad(one(1.0)).unwrap();
    let (key, reason) = refused(save(&sgd));
    assert_eq!(key, "optimizer/first");
    assert!(
        reason.contains("call zero_grad") && reason.contains("`second`"),
        "{reason}"
    );
    sgd.step_unscaled().unwrap();
    // Gradients that were used may stay.
    save(&sgd).unwrap();
    second.accumulate_grad(one(1.0)).unwrap();
    assert_eq!(refused(save(&sgd)).0, "optimizer/second");
    // Averages that come and go are no step.
    let ema = Ema::new(&both, 0.5).unwrap();
    ema.with_averages(|| Ok(())).unwrap();
    assert_eq!(refused(save(&sgd)).0, "optimizer/second");
    second.zero_grad();
    save(&sgd).unwrap();
    // Nor is a step that failed.
    first
        .set_scaled_grad(
            one(1.0),
            GradScaler::new(&context, AmpConfig::default())
                .unwrap()
                .tag(),
        )
        .unwrap();
    sgd.step_unscaled().unwrap_err();
    assert_eq!(refused(save(&sgd)).0, "optimizer/first");
}

#[test]
fn windows_under_a_scaler_are_known_tagged_or_not() {
    let context = context();
    for tagged in [false, true] {
        let weight = parameter(&context, "w", &[0f32]);
        let mut sgd = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
        let mut scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
        let save = |sgd: &Sgd, scaler: &GradScaler| {
            let mut saved = Checkpoint::new();
            saved.add_scaler(scaler)?;
            saved.add_optimizer("optimizer", sgd)
        };
        // An overflow uses its gradients as well.
        for number in [1.0, f32::NAN] {
            for _ in 0..2 {
                let grad = scaler.scale(&tensor(&context, &[number])).unwrap();
                let tag = scaler.tag().filter(|_| tagged);
                weight.accumulate_scaled_grad(grad, tag).unwrap();
                let (key, _) = refused(save(&sgd, &scaler));
                assert_eq!(key, "optimizer/w");
            }
            let _ = scaler.step(&mut sgd).unwrap();
            scaler.update().unwrap();
            save(&sgd, &scaler).unwrap();
            weight.zero_grad();
        }
    }
    let (parameters, mut optimizer) = joined(&context);
    step(&parameters, &mut optimizer);
    let grad = optimizer.scaler().scale(&tensor(&context, &[1f32, 2.0]));
    optimizer.accumulate(&parameters[1], grad.unwrap()).unwrap();
    let mut saved = Checkpoint::new();
    let (key, _) = refused(saved.add_amp_optimizer(&optimizer));
    assert_eq!(key, "optimizer/layer.bias");
    assert_eq!(saved.parts().count(), 0);
}

const FORMS: [MasterWeights; 3] = [MasterWeights::F32, MasterWeights::Split, MasterWeights::Off];

/// A weight of two, and plain descent that moves it by far less than bf16 shows.
fn descent(context: &Context, master_weights: MasterWeights) -> (Parameter, Sgd) {
    let weight = parameter(context, "w", &[bf16::ONE; 2]);
    let config = SgdConfig {
        learning_rate: 1e-4,
        master_weights,
        ..SgdConfig::default()
    };
    let sgd = Sgd::new(vec![weight.clone()], config).unwrap();
    (weight, sgd)
}

/// Steps with the gradient 1.
fn steps(weight: &Parameter, sgd: &mut Sgd, count: u32) {
    set_grad(weight, &[1f32; 2]);
    for _ in 0..count {
        sgd.step_unscaled().unwrap();
    }
}

/// The weight and what is kept beside it.
fn bits(weight: &Parameter, sgd: &Sgd) -> Vec<HostTensor> {
    let state = sgd.state(0).into_iter().map(|(_, tensor)| tensor);
    let all = std::iter::once(weight.value().clone()).chain(state);
    all.map(|tensor| tensor.to_host().unwrap()).collect()
}

#[test]
fn weights_that_someone_wrote_are_where_the_next_step_begins() {
    type Write = fn(&Parameter) -> Result<()>;
    let writes: [(&str, Write); 6] = [
        ("fill", |weight| weight.value().fill(5.0)),
        ("copy_from", |weight| {
            let value = weight.value();
            value.copy_from(&Tensor::full(value.context(), [2], DType::F32, 5.0)?)
        }),
        ("copy_from_slice", |weight| {
            weight.value().copy_from_slice(&[bf16::from_f32(5.0); 2])
        }),
        ("narrow", |weight| {
            let view = |place| weight.value().narrow(0, place, 1);
            view(0)?.fill(5.0)?;
            view(1)?.fill(5.0)
        }),
        ("reshape", |weight| {
            weight.value().reshape([1, 2])?.fill(5.0)
        }),
        ("model", |weight| {
            let five = Tensor::full(weight.value().context(), [2], DType::Bf16, 5.0)?;
            let mut saved = Checkpoint::new();
            saved.add_model(&[Parameter::new("w", five)?])?;
            saved
                .restore()
                .model(std::slice::from_ref(weight))?
                .finish()
        }),
    ];
    let context = context();
    for form in FORMS {
        for (way, write) in writes {
            let (weight, mut sgd) = descent(&context, form);
            steps(&weight, &mut sgd, 3);
            write(&weight).unwrap();
            // As if all had begun there.
            let (fresh, mut reference) = descent(&context, form);
            fresh.value().fill(5.0).unwrap();
            reference.reload_master_weights().unwrap();
            assert_eq!(
                bits(&weight, &sgd),
                bits(&fresh, &reference),
                "{form:?} {way}"
            );
            steps(&weight, &mut sgd, 40);
            steps(&fresh, &mut reference, 40);
            assert_eq!(
                bits(&weight, &sgd),
                bits(&fresh, &reference),
                "{form:?} {way}"
            );
            set_grad(&weight, &[0f32; 2]);
            sgd.step_unscaled().unwrap();
            assert_eq!(value::<bf16>(&weight), [bf16::from_f32(5.0); 2]);
        }
    }
}

#[test]
fn a_skipped_step_does_not_hide_a_write() {
    let context = context();
    for form in FORMS {
        let (weight, mut sgd) = descent(&context, form);
        steps(&weight, &mut sgd, 3);
        weight.value().fill(5.0).unwrap();
        let skip = StepInputs {
            found_inf: Some(Tensor::full(&context, [], DType::F32, 1.0).unwrap()),
            ..StepInputs::default()
        };
        sgd.step(&skip).unwrap();
        set_grad(&weight, &[0f32; 2]);
        sgd.step_unscaled().unwrap();
        assert_eq!(value::<bf16>(&weight), [bf16::from_f32(5.0); 2], "{form:?}");
    }
}

#[test]
fn averages_that_come_and_go_leave_masters_alone() {
    let context = context();
    for form in FORMS {
        let (weight, mut sgd) = descent(&context, form);
        let (other, mut reference) = descent(&context, form);
        let mut ema = Ema::of(&sgd, 0.5).unwrap();
        for _ in 0..5 {
            steps(&weight, &mut sgd, 7);
            steps(&other, &mut reference, 7);
            ema.update(None).unwrap();
            ema.with_averages(|| Ok(())).unwrap();
            assert_eq!(bits(&weight, &sgd), bits(&other, &reference), "{form:?}");
        }
        // What was written while they were there does not stay, and costs at most what 16 bits do not show.
        ema.with_averages(|| weight.value().fill(9.0)).unwrap();
        set_grad(&weight, &[0f32; 2]);
        sgd.step_unscaled().unwrap();
        assert_eq!(value::<bf16>(&weight), value::<bf16>(&other), "{form:?}");
    }
}

#[test]
fn a_restored_training_goes_on_from_its_masters_in_any_order_of_the_calls() {
    let context = context();
    for form in FORMS {
        let (through, mut reference) = descent(&context, form);
        steps(&through, &mut reference, 33);
        let mut saved = Checkpoint::new();
        saved.add_model(std::slice::from_ref(&through)).unwrap();
        saved.add_optimizer("optimizer", &reference).unwrap();
        let dict = reference.state_dict().unwrap();
        let values = through.value().duplicate().unwrap();
        steps(&through, &mut reference, 40);
        for way in 0..4 {
            let (weight, mut sgd) = descent(&context, form);
            steps(&weight, &mut sgd, 5);
            weight.value().fill(9.0).unwrap();
            let model = std::slice::from_ref(&weight);
            match way {
                0 => {
                    let restore = saved.restore().model(model).unwrap();
                    let restore = restore.optimizer("optimizer", &mut sgd).unwrap();
                    restore.finish().unwrap();
                }
                1 => {
                    let restore = saved.restore().optimizer("optimizer", &mut sgd).unwrap();
                    restore.model(model).unwrap().finish().unwrap();
                }
                2 => {
                    weight.value().copy_from(&values).unwrap();
                    sgd.load_state_dict(&dict).unwrap();
                }
                _ => {
                    sgd.load_state_dict(&dict).unwrap();
                    weight.value().copy_from(&values).unwrap();
                }
            }
            steps(&weight, &mut sgd, 40);
            assert_eq!(
                bits(&weight, &sgd),
                bits(&through, &reference),
                "{form:?} {way}"
            );
        }
    }
}

#[test]
fn a_master_that_is_stale_is_not_saved() {
    let context = context();
    for form in FORMS {
        let (weight, mut sgd) = descent(&context, form);
        steps(&weight, &mut sgd, 9);
        weight.value().fill(5.0).unwrap();
        let mut saved = Checkpoint::new();
        saved.add_model(std::slice::from_ref(&weight)).unwrap();
        weight.zero_grad();
        saved.add_optimizer("optimizer", &sgd).unwrap();
        let (again, mut other) = descent(&context, form);
        let restore = saved.restore().model(std::slice::from_ref(&again)).unwrap();
        let restore = restore.optimizer("optimizer", &mut other).unwrap();
        restore.finish().unwrap();
        set_grad(&again, &[0f32; 2]);
        other.step_unscaled().unwrap();
        assert_eq!(value::<bf16>(&again), [bf16::from_f32(5.0); 2], "{form:?}");
    }
}

#[test]
fn other_weights_after_a_restoration_win() {
    let context = context();
    for form in FORMS {
        let (weight, mut sgd) = descent(&context, form);
        let dict = sgd.state_dict().unwrap();
        sgd.load_state_dict(&dict).unwrap();
        weight.value().fill(5.0).unwrap();
        set_grad(&weight, &[0f32; 2]);
        sgd.step_unscaled().unwrap();
        assert_eq!(value::<bf16>(&weight), [bf16::from_f32(5.0); 2], "{form:?}");
    }
}

#[test]
fn views_of_one_buffer_have_masters_of_their_own() {
    let context = context();
    for form in FORMS {
        let flat = Tensor::full(&context, [4], DType::Bf16, 1.0).unwrap();
        let part = |name: &str, at| Parameter::new(name, flat.narrow(0, at, 2).unwrap()).unwrap();
        let (first, second) = (part("w", 0), part("other", 2));
        let (alone, mut reference) = descent(&context, form);
        let config = *reference.config();
        let mut one = Sgd::new(vec![first.clone()], config).unwrap();
        let mut two = Sgd::new(vec![second.clone()], config).unwrap();
        for _ in 0..40 {
            steps(&first, &mut one, 1);
            steps(&second, &mut two, 1);
            second.value().fill(1.0).unwrap();
            steps(&alone, &mut reference, 1);
        }
        assert_eq!(bits(&first, &one), bits(&alone, &reference), "{form:?}");
        assert_eq!(value::<bf16>(&second), [bf16::ONE; 2]);
    }
}

#[test]
fn a_step_reloads_once_and_never_within_a_capture() {
    let device = support::device::device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(device.driver().clone()));
    let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
    for form in [MasterWeights::F32, MasterWeights::Split] {
        let (weight, mut sgd) = descent(&context, form);
        steps(&weight, &mut sgd, 2);
        let mut calls = || {
            faults.reset_calls();
            sgd.step_unscaled().unwrap();
            faults.total_calls()
        };
        let plain = calls();
        assert_eq!(calls(), plain);
        weight.value().fill(5.0).unwrap();
        assert!(calls() > plain, "{form:?}");
        assert_eq!(calls(), plain, "{form:?}");

        weight.value().fill(6.0).unwrap();
        let stream = context.stream();
        let refused = stream.capture(|| sgd.step_unscaled());
        let Err(Error::Capturing { call }) = refused else {
            panic!("{refused:?}");
        };
        assert!(call.contains("reload_master_weights"), "{call}");
        sgd.reload_master_weights().unwrap();
        let graph = stream.capture(|| sgd.step_unscaled()).unwrap();
        for _ in 0..3 {
            // SAFETY: the weight, its gradient and the optimizer live on.
            unsafe { graph.launch(stream) }.unwrap();
        }
        // Three steps of 10⁻⁴, as eager ones: the replays moved the masters.
        let (eager, mut reference) = descent(&context, form);
        eager.value().fill(6.0).unwrap();
        steps(&eager, &mut reference, 3);
        assert_eq!(bits(&weight, &sgd), bits(&eager, &reference), "{form:?}");
        steps(&weight, &mut sgd, 40);
        steps(&eager, &mut reference, 40);
        assert_eq!(bits(&weight, &sgd), bits(&eager, &reference), "{form:?}");
    }
}
