//! The scaler over a training: off and on, saved and restored, its memory, any schedule.
#![allow(unsafe_code, reason = "replaying a graph is")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use crate::support::amp::{
    context, grad, ones, parameter, scaler, scaler_with, set_grad, sgd, tensor, value,
};
use kitsune::amp::{AmpConfig, GradScaler, ScalerState, StepOutcome};
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, Device, Error, HostConfig, HostSchedule, Tensor, f16, ops};

#[test]
fn a_disabled_scaler_is_not_there() {
    let context = context();
    let weight = ones(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 0.25);
    let before = context.pool().stats().allocation.allocated;
    let config = AmpConfig {
        enabled: false,
        ..AmpConfig::default()
    };
    let mut scaler = GradScaler::new(&context, config).unwrap();
    assert_eq!(context.pool().stats().allocation.allocated, before);
    assert!(!scaler.is_enabled());
    let loss = tensor(&context, &[2f32]);
    assert!(scaler.scale(&loss).unwrap().is_same(&loss));
    scaler.unscale(&optimizer).unwrap();
    scaler.unscale(&optimizer).unwrap();
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    scaler.update().unwrap();
    scaler.update_to(f64::NAN).unwrap();
    assert_eq!(value::<f32>(&weight), [0.75]);
    set_grad(&weight, &[3f32]);
    assert_eq!(
        scaler
            .clip_grad_norm(&optimizer, 1.0)
            .unwrap()
            .item::<f64>()
            .unwrap(),
        3.0
    );
    let clipped = grad::<f32>(&weight)[0];
    assert!((clipped - 1.0).abs() < 1e-5, "{clipped}");
    let stats = scaler.stats().unwrap();
    assert_eq!(
        (stats.scale, stats.steps, stats.applied, stats.skipped),
        (1.0, 1, 1, 0)
    );
    // A plain loop: an infinite gradient is applied.
    set_grad(&weight, &[f32::INFINITY]);
    let _ = scaler.step(&mut optimizer).unwrap();
    assert_eq!(value::<f32>(&weight), [f32::NEG_INFINITY]);
}

#[test]
fn losses_scale_in_any_nesting() {
    let context = context();
    let scaler = scaler(&context, 2.0);
    let four = || Tensor::full(&context, [], DType::F32, 4.0).unwrap();
    let item = |tensor: &Tensor| tensor.item::<f32>().unwrap();
    let (a, (b, c), list) = scaler
        .scale(&(
            four(),
            (four(), four()),
            vec![[four(), four()], [four(), four()]],
        ))
        .unwrap();
    assert_eq!([item(&a), item(&b), item(&c)], [8.0; 3]);
    let list: Vec<_> = list.iter().flatten().map(item).collect();
    assert_eq!(list, [8.0; 4]);
    assert_eq!(scaler.scale(&[four()][..]).unwrap().len(), 1);
    let other = support::amp::context();
    let foreign = Tensor::full(&other, [], DType::F32, 4.0).unwrap();
    assert!(matches!(
        scaler.scale(&foreign),
        Err(Error::InvalidArgument { .. })
    ));
}

#[test]
fn a_saved_state_goes_through_json() {
    let context = context();
    let config = AmpConfig {
        init_scale: 3.0,
        growth_factor: 4.0,
        backoff_factor: 0.25,
        growth_interval: 2,
        ..AmpConfig::default()
    };
    let weight = ones(&context, "w", &[0f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut first = scaler_with(&context, config);
    let _ = first.step(&mut optimizer).unwrap();
    first.update().unwrap();
    let text = serde_json::to_string(&first.state_dict().unwrap()).unwrap();
    assert!(
        text.contains(r#""scale":3.0"#) && text.contains(r#""_growth_tracker":1"#),
        "{text}"
    );

    let mut second = scaler(&context, 512.0);
    second
        .load_state_dict(&serde_json::from_str(&text).unwrap())
        .unwrap();
    let facts = (
        second.growth_factor(),
        second.backoff_factor(),
        second.growth_interval(),
    );
    assert_eq!(
        (second.scale_factor().unwrap(), facts),
        (3.0, (4.0, 0.25, 2))
    );
    // It goes on where the first would: one more clean update, and the scale grows.
    // An optimizer has one scaler.
    drop(first);
    set_grad(&weight, &[0f32]);
    let _ = second.step(&mut optimizer).unwrap();
    second.update().unwrap();
    assert_eq!(second.scale_factor().unwrap(), 12.0);
    let loss = second.scale(&tensor(&context, &[4f32])).unwrap();
    assert_eq!(loss.to_vec::<f32>().unwrap(), [48.0]);

    // What PyTorch saves has five keys.
    let torch = r#"{"scale": 256.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                    "growth_interval": 2000, "_growth_tracker": 7}"#;
    second
        .load_state_dict(&serde_json::from_str(torch).unwrap())
        .unwrap();
    assert_eq!(second.state_dict().unwrap().growth_tracker, Some(7));
}

#[test]
fn a_broken_state_changes_nothing() {
    let context = context();
    let mut scaler = scaler(&context, 8.0);
    let good = scaler.state_dict().unwrap();
    let broken: [(&str, ScalerState); 8] = [
        (
            "scale",
            ScalerState {
                scale: Some(-5.0),
                ..good.clone()
            },
        ),
        (
            "scale",
            ScalerState {
                scale: Some(f64::INFINITY),
                ..good.clone()
            },
        ),
        (
            "backoff_factor",
            ScalerState {
                backoff_factor: Some(9.0),
                ..good.clone()
            },
        ),
        (
            "growth_factor",
            ScalerState {
                growth_factor: Some(0.5),
                ..good.clone()
            },
        ),
        (
            "growth_interval",
            ScalerState {
                growth_interval: Some(0),
                ..good.clone()
            },
        ),
        (
            "_growth_tracker",
            ScalerState {
                growth_tracker: Some(1 << 31),
                ..good.clone()
            },
        ),
        (
            "version",
            ScalerState {
                version: Some(3),
                ..good.clone()
            },
        ),
        (
            "_growth_tracker",
            ScalerState {
                growth_tracker: None,
                ..good.clone()
            },
        ),
    ];
    for (expected, state) in broken {
        match scaler.load_state_dict(&state) {
            Err(Error::InvalidState { key, .. }) => assert_eq!(key, expected),
            other => panic!("{other:?}"),
        }
        assert_eq!(scaler.state_dict().unwrap(), good);
    }
    assert!(serde_json::from_str::<ScalerState>(r#"{"skale": 1.0}"#).is_err());
}

#[test]
fn nothing_is_allocated_after_the_first_step() {
    let context = context();
    let weights: Vec<_> = (0..5)
        .map(|i| ones(&context, &format!("w{i}"), &[1f32; 3000]))
        .collect();
    let mut optimizer = AdamW::new(weights, AdamWConfig::default()).unwrap();
    let mut scaler = scaler(&context, 8.0);
    let mut step = |scaler: &mut GradScaler| {
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
    };
    step(&mut scaler);
    let before = context.pool().stats();
    for _ in 0..10 {
        step(&mut scaler);
    }
    let after = context.pool().stats();
    // Not even from the pool.
    assert_eq!(after.allocation.allocated, before.allocation.allocated);
    assert_eq!(after.num_device_alloc, before.num_device_alloc);
    let amp = context
        .pool()
        .tag_stats()
        .into_iter()
        .find(|stat| stat.tag == "amp")
        .unwrap();
    assert!(amp.allocated_bytes.current > 0);
    // New gradients each step come out of the pool; clipping takes one number.
    for _ in 0..10 {
        for weight in optimizer.parameters() {
            weight.zero_grad();
            set_grad(weight, &[1f32; 3000]);
        }
        scaler.unscale(&optimizer).unwrap();
        scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
    }
    assert_eq!(
        context.pool().stats().num_device_alloc,
        before.num_device_alloc
    );
}

#[test]
fn slots_of_dropped_optimizers_are_used_again() {
    let context = context();
    let weight = ones(&context, "w", &[0f32]);
    let mut scaler = scaler(&context, 8.0);
    for round in 0..300 {
        let mut optimizer = sgd(&[&weight], 1.0);
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        assert_eq!(scaler.stats().unwrap().steps, round + 1);
    }
    let mut living: Vec<_> = (0..257).map(|_| sgd(&[&weight], 1.0)).collect();
    let (last, first) = living.split_last_mut().unwrap();
    for optimizer in first {
        let _ = scaler.step(optimizer).unwrap();
    }
    assert!(matches!(
        scaler.step(last),
        Err(Error::InvalidArgument { .. })
    ));
}

/// Trains two weights on four batches, with an overflow in batch 2, and gives weights and scale.
fn train(context: &Context, enabled: bool) -> (Vec<f32>, f64) {
    let config = AmpConfig {
        enabled,
        init_scale: 128.0,
        growth_interval: 1,
        ..AmpConfig::default()
    };
    let weights = [
        parameter(context, "a", &[1f32; 8]),
        parameter(context, "b", &[2f32; 3]),
    ];
    let momentum = SgdConfig {
        learning_rate: 0.1,
        momentum: 0.9,
        ..SgdConfig::default()
    };
    let mut optimizer = Sgd::new(weights.to_vec(), momentum).unwrap();
    let mut scaler = scaler_with(context, config);
    for batch in 0..4 {
        for weight in &weights {
            // The gradient of the scaled loss scale · Σ w² / 2.
            let current = weight.value().duplicate().unwrap();
            weight.set_grad(scaler.scale(&current).unwrap()).unwrap();
        }
        if batch == 2 {
            if !enabled {
                continue;
            }
            weights[1]
                .grad()
                .unwrap()
                .narrow(0, 1, 1)
                .unwrap()
                .fill(f64::INFINITY)
                .unwrap();
        }
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
    }
    let scale = scaler.scale_factor().unwrap();
    (
        [value::<f32>(&weights[0]), value(&weights[1])].concat(),
        scale,
    )
}

#[test]
fn training_equals_one_that_leaves_the_bad_batch_out() {
    let context = context();
    let (plain, one) = train(&context, false);
    let (scaled, scale) = train(&context, true);
    assert_eq!((one, scale), (1.0, 128.0 * 2f64.powi(3) * 0.5));
    // Scales are powers of two, so not even the last bit differs.
    assert_eq!(scaled, plain);
}

#[test]
fn training_is_the_same_on_every_schedule() {
    let expected = train(&context(), true);
    for seed in 0..50 {
        let config = HostConfig {
            schedule: HostSchedule::Seeded(seed),
            ..HostConfig::default()
        };
        let context = Context::new(&Device::host(config).unwrap()).unwrap();
        assert_eq!(train(&context, true), expected, "seed {seed}");
    }
}

#[test]
fn scalers_can_move_between_threads() {
    fn check<T: Send + Sync>() {}
    check::<GradScaler>();
    check::<Parameter>();
    check::<AdamW>();
    check::<StepOutcome>();
}

#[test]
fn scaling_a_loss_saves_gradients_that_f16_would_lose() {
    let context = context();
    // The second class of the first row has a probability of 2·10⁻⁹: less than the least f16.
    let logits = [20.0, 0.0, 0.0, 1.0].map(f16::from_f32);
    let logits = Tensor::from_slice(&context, [2, 2], &logits).unwrap();
    let loss = ops::softmax_cross_entropy(&logits, &tensor(&context, &[0u32, 1])).unwrap();
    let plain = loss.backward().unwrap().to_vec::<f16>().unwrap();
    assert_eq!(plain[1], f16::ZERO);

    let scaler = scaler(&context, 65536.0);
    let scaled = scaler.scale(&loss).unwrap();
    let scaled_value = scaled.value().item::<f32>().unwrap();
    assert_eq!(scaled_value, 65536.0 * loss.value().item::<f32>().unwrap());
    let gradient = scaled.backward().unwrap();
    assert_eq!(gradient.dtype(), DType::F16);
    let gradient = gradient.to_vec::<f16>().unwrap();
    let expected = (-20f64).exp() / 2.0 * 65536.0;
    assert!(
        (gradient[1].to_f64() / expected - 1.0).abs() < 1e-2,
        "{gradient:?}"
    );
    // What survived anyway is the same but for the scale.
    assert!((gradient[2].to_f64() / 65536.0 - plain[2].to_f64()).abs() < 1e-3);
}

#[test]
fn settings_open_the_scope_they_describe() {
    use kitsune::ops::autocast::autocast_dtype;
    let config = AmpConfig {
        dtype: DType::Bf16,
        ..AmpConfig::default()
    };
    assert_eq!(
        config.in_autocast(|| autocast_dtype("linear")),
        Some(DType::Bf16)
    );
    let off = AmpConfig {
        enabled: false,
        ..config.clone()
    };
    {
        let _outer = config.autocast();
        assert_eq!(off.in_autocast(|| autocast_dtype("linear")), None);
        assert_eq!(autocast_dtype("linear"), Some(DType::Bf16));
    }
    assert_eq!(autocast_dtype("linear"), None);
}

/// How steps after the first are run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Eager,
    Captured,
    /// With memory of a private pool.
    Private,
}

#[test]
fn a_captured_step_replays_like_an_eager_one() {
    type Launch = Box<dyn Fn() -> kitsune::Result<()>>;
    let gradients = [2.0, f32::INFINITY, -4.0, 8.0];
    let run = |way: Way| {
        let context = context();
        let stream = context.stream().clone();
        let weight = ones(&context, "w", &[f16::ONE; 5]);
        let slot = Tensor::full(&context, [5], DType::F16, 0.0).unwrap();
        weight.set_grad(slot.clone()).unwrap();
        let mut optimizer = AdamW::new(vec![weight.clone()], AdamWConfig::default()).unwrap();
        let mut scaler = scaler(&context, 16.0);
        let mut norms = Vec::new();
        let mut step = || -> kitsune::Result<()> {
            norms.push(scaler.clip_grad_norm(&optimizer, 0.5)?);
            let _ = scaler.step(&mut optimizer)?;
            scaler.update()
        };
        // The first two steps make all memory, with a gradient of zeros.
        step().unwrap();
        let private = context.pool().private().unwrap();
        if way == Way::Private {
            private.prime(&mut step).unwrap();
        } else {
            step().unwrap();
        }
        // A graph touches the scaler, the optimizer, the parameter, its gradient and the norms, all alive below.
        let launch: Option<Launch> = match way {
            Way::Eager => None,
            Way::Captured => {
                let graph = stream.capture(&mut step).unwrap();
                // SAFETY: as above.
                Some(Box::new(move || unsafe { graph.launch(&stream) }))
            }
            Way::Private => {
                let graph = private.capture(&stream, &mut step).unwrap();
                // SAFETY: as above.
                Some(Box::new(move || unsafe { graph.launch(&stream) }))
            }
        };
        for gradient in gradients {
            slot.fill(f64::from(gradient)).unwrap();
            launch
                .as_ref()
                .map_or_else(&mut step, |launch| launch())
                .unwrap();
        }
        let steps = optimizer.step_counts().to_vec::<u32>().unwrap();
        let moment = optimizer.second_moment(0).unwrap().to_vec::<f32>().unwrap();
        let stats = scaler.stats().unwrap();
        let counts = (stats.steps, stats.skipped, stats.scale);
        (value::<f16>(&weight), moment, steps, counts)
    };
    let eager = run(Way::Eager);
    assert_eq!((&eager.2, eager.3), (&vec![5], (6, 1, 8.0)));
    for way in [Way::Captured, Way::Private] {
        assert_eq!(run(way), eager, "{way:?}");
    }
}
