//! Watching a scaler: times, alarms, memory, and answers that nobody waits for.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "replaying a graph is unsafe, and a test fails by panicking"
)]

use std::time::Duration;

use crate::support::amp::{context, ones, scaler_with, set_grad, sgd, tensor};
use kitsune::amp::{AlarmKind, AmpConfig, GradScaler, Magnitudes, StepTimes};
use kitsune::optim::{Optimizer, Parameter};
use kitsune::{Context, DType, Error, Tensor};

#[test]
fn the_device_times_what_it_is_told_to() {
    let context = context();
    let weight = ones(&context, "w", &vec![1f32; 50_000]);
    let mut optimizer = sgd(&[&weight], 0.5);
    let mut untimed = scaler_with(&context, AmpConfig::default());
    let _ = untimed.step(&mut optimizer).unwrap();
    untimed.update().unwrap();
    assert_eq!(untimed.stats().unwrap().times, None);
    drop(untimed);

    let config = AmpConfig {
        timing: true,
        ..AmpConfig::default()
    };
    let mut scaler = scaler_with(&context, config);
    assert_eq!(scaler.stats().unwrap().times, Some(StepTimes::default()));
    let mut clips = false;
    let mut step = || {
        if clips {
            scaler.clip_grad_norm(&optimizer, 1.0)?;
        }
        clips = !clips;
        let _ = scaler.step(&mut optimizer)?;
        scaler.update()?;
        Ok(scaler.stats().unwrap().times.unwrap())
    };
    let without = step().unwrap();
    let with: kitsune::Result<StepTimes> = step();
    let with = with.unwrap();
    assert!(without.check > Duration::ZERO && without.step > Duration::ZERO);
    assert_eq!(without.clip, Duration::ZERO);
    assert!(with.clip > Duration::ZERO);
    assert!(with.check > without.check && with.step > without.step);
}

#[test]
fn replays_are_timed() {
    let context = context();
    let weight = ones(&context, "w", &vec![0f32; 50_000]);
    let mut optimizer = sgd(&[&weight], 0.5);
    let config = AmpConfig {
        timing: true,
        alarm_interval: 1,
        ..AmpConfig::default()
    };
    let mut scaler = scaler_with(&context, config);
    let _ = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    // Nothing is looked for while a capture is under way.
    let graph = context
        .stream()
        .capture(|| {
            let _ = scaler.step(&mut optimizer)?;
            scaler.update()
        })
        .unwrap();
    let before = scaler.stats().unwrap();
    // SAFETY: the scaler, the weight and its gradient live on.
    unsafe { graph.launch(context.stream()) }.unwrap();
    let after = scaler.stats().unwrap();
    assert_eq!(after.steps, before.steps + 1);
    assert!(after.times.unwrap().check > before.times.unwrap().check);
}

#[test]
fn updates_find_an_alarm_some_steps_late_and_go_on() {
    let context = context();
    let weight = ones(&context, "w", &[0f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let config = AmpConfig {
        init_scale: 2.0,
        min_scale: 1.0,
        alarm_interval: 4,
        ..AmpConfig::default()
    };
    let mut scaler = scaler_with(&context, config);
    let mut alarms = Vec::new();
    for step in 1..=12 {
        set_grad(&weight, &[if step <= 3 { f32::INFINITY } else { 0.0 }]);
        let _ = scaler.step(&mut optimizer).unwrap();
        context.synchronize().unwrap();
        match scaler.update() {
            Ok(()) => {}
            Err(Error::ScalerAlarm(alarm)) => alarms.push((step, alarm.kind)),
            Err(other) => panic!("{other}"),
        }
    }
    // After the fourth update it has recovered: alarms tell what is, not what was.
    assert_eq!(alarms, []);
    for step in 13..=18 {
        set_grad(&weight, &[f32::INFINITY]);
        let _ = scaler.step(&mut optimizer).unwrap();
        context.synchronize().unwrap();
        if let Err(Error::ScalerAlarm(alarm)) = scaler.update() {
            assert_eq!(alarm.last_good_scale, Some(1.0));
            alarms.push((step, alarm.kind));
        }
    }
    // Asked for by the sixteenth update, told by the seventeenth.
    assert_eq!(alarms, [(17, AlarmKind::AtFloor)]);
    assert_eq!(scaler.stats().unwrap().updates, 18, "no update was lost");
    let told = scaler.alarm().unwrap().unwrap().to_string();
    let expected = "gradients overflow at the smallest scale, 1; the last applied step had scale 1";
    assert_eq!(told, expected);
}

#[test]
fn statistics_count_the_memory_of_scaling() {
    let context = context();
    let weight = ones(&context, "w", &[0f32; 100]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler_with(&context, AmpConfig::default());
    let fresh = scaler.stats().unwrap();
    assert!(fresh.scratch_bytes > 0);
    let _ = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    let used = scaler.stats().unwrap();
    assert!(
        used.scratch_bytes > fresh.scratch_bytes,
        "the table of gradients"
    );
    assert!(used.scratch_peak_bytes >= used.scratch_bytes);
    assert!(used.to_string().contains("of scratch"));
}

/// Bytes of the pool under the tag of scaling now, and those of each scaler.
fn scratch<const N: usize>(context: &Context, scalers: [&GradScaler; N]) -> (u64, [u64; N]) {
    let tags = context.pool().tag_stats();
    let amp = tags.iter().find(|tag| tag.tag == "amp").unwrap();
    let each = scalers.map(|scaler| scaler.stats().unwrap().scratch_bytes);
    (amp.allocated_bytes.current, each)
}

#[test]
fn each_scaler_counts_its_own_memory() {
    let context = context();
    let config = AmpConfig::default();
    let mut one = scaler_with(&context, config.clone());
    let fresh = one.stats().unwrap().scratch_bytes;
    // Scale, inverse, trackers, flags, journal: nothing else has the tag.
    assert_eq!(scratch(&context, [&one]), (fresh, [fresh]));
    let two = scaler_with(&context, config);
    assert_eq!(scratch(&context, [&one, &two]), (2 * fresh, [fresh; 2]));

    // Slots: a table of gradients and what a check finds. No optimizer steps, so that none has tables of its own.
    let weights: Vec<_> = (0..500)
        .map(|index| ones(&context, &format!("w{index}"), &[1f32; 3]))
        .collect();
    let many = sgd(&weights.iter().collect::<Vec<_>>(), 1.0);
    one.check(&many).unwrap();
    one.update().unwrap();
    let (all, [first, second]) = scratch(&context, [&one, &two]);
    assert_eq!((all, second), (first + second, fresh));
    // A norm and four counts for each, and more for the table.
    assert!(first > fresh + 500 * 24, "{first}");
    let peak = one.stats().unwrap().scratch_peak_bytes;
    assert_eq!(peak, first);

    // A smaller optimizer takes the place of one that is gone.
    drop(many);
    let few = sgd(&[&weights[0]], 1.0);
    one.check(&few).unwrap();
    one.update().unwrap();
    let (all, [smaller, second]) = scratch(&context, [&one, &two]);
    assert_eq!((all, second), (smaller + second, fresh));
    assert!(
        fresh < smaller && smaller < first,
        "{fresh} {smaller} {first}"
    );
    let stats = one.stats().unwrap();
    // Both were there for a moment at most.
    assert!((first..=first + smaller).contains(&stats.scratch_peak_bytes));
}

#[test]
fn what_is_found_where_a_gradient_is_made_counts_for_the_scaler_that_asked_last() {
    let context = context();
    let config = AmpConfig::default();
    let one = scaler_with(&context, config.clone());
    let mut two = scaler_with(&context, config);
    let fresh = one.stats().unwrap().scratch_bytes;
    let sum = Parameter::new("sum", Tensor::zeros(&context, [5000], DType::F32).unwrap()).unwrap();
    let accumulate = |scaler: &GradScaler| {
        sum.zero_grad();
        for _ in 0..2 {
            let term = Tensor::zeros(&context, [5000], DType::F32).unwrap();
            scaler.accumulate(&sum, term).unwrap();
        }
    };
    accumulate(&one);
    let (all, [with_partials, second]) = scratch(&context, [&one, &two]);
    assert_eq!((all, second), (with_partials + second, fresh));
    assert!(with_partials > fresh);
    accumulate(&two);
    let (all, [without, second]) = scratch(&context, [&one, &two]);
    assert_eq!((all, without), (without + second, fresh));
    assert_eq!(second, with_partials);
    let mut optimizer = sgd(&[&sum], 1.0);
    two.check(&optimizer).unwrap();
    two.clip_grad_norm(&optimizer, 1.0).unwrap();
    let (all, [first, second]) = scratch(&context, [&one, &two]);
    assert_eq!(all, first + second);

    // An optimizer's table is not the scaler's.
    let before = two.stats().unwrap().scratch_bytes;
    let _ = two.step(&mut optimizer).unwrap();
    two.update().unwrap();
    assert_eq!(two.stats().unwrap().scratch_bytes, before);
    optimizer.zero_grad();
    // A scaler that is gone takes nothing with it that is another's.
    drop((one, optimizer));
    assert_eq!(two.stats().unwrap().scratch_bytes, before);
    drop(sum);
    let (all, [last]) = scratch(&context, [&two]);
    assert_eq!(all, last);
    assert!(last < before);
}

#[test]
fn magnitudes_tell_what_a_type_would_lose() {
    let context = context();
    let gradient = tensor(
        &context,
        &[0f32, f32::NAN, f32::INFINITY, 1e-9, 3e-9, 1.0, 1e30],
    );
    let magnitudes = Magnitudes::of(&gradient).unwrap();
    assert_eq!(
        (magnitudes.zeros, magnitudes.nans, magnitudes.infs),
        (1, 1, 1)
    );
    assert_eq!(magnitudes.vanishing(DType::F16), 2);
    assert_eq!(magnitudes.overflowing(DType::F16), 1);
    assert_eq!(
        magnitudes.vanishing(DType::Bf16) + magnitudes.overflowing(DType::Bf16),
        0
    );
    assert_eq!(magnitudes.by_exponent[&0], 1);
    let refused = Magnitudes::of(&tensor(&context, &[1u32]));
    assert!(matches!(refused, Err(Error::UnsupportedDtype { .. })));
}
