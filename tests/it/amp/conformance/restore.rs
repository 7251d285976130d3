//! A state that is loaded in the middle of an iteration leaves exactly the training that was saved.

use std::sync::Arc;

use kitsune::amp::{
    AlarmKind, AmpConfig, AmpOptimizer, AmpOptimizerState, GradScaler, NanPolicy, Outcome, Refill,
    ScalerState, SkipPolicy,
};
use kitsune::checkpoint::Checkpoint;
use kitsune::driver::fault::FaultDriver;
use kitsune::error::ScalerMisuse;
use kitsune::optim::{Optimizer, OptimizerId, Parameter, Sgd, StepInputs};
use kitsune::{Context, DType, Device, Error, HostConfig, Result, Tensor, ops};

use crate::support::amp::oracle::misuse;
use crate::support::amp::{context, flag, parameter, scaler_with, set_grad, sgd, tensor, value};
use crate::support::device::device;

const INF: f32 = f32::INFINITY;

/// What was done for the optimizer when the state is loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Ready,
    Checked,
    Clipped,
    Unscaled,
    UnscaledClipped,
    Stepped,
    ClippedStepped,
    Updated,
}

const STAGES: [Stage; 8] = [
    Stage::Ready,
    Stage::Checked,
    Stage::Clipped,
    Stage::Unscaled,
    Stage::UnscaledClipped,
    Stage::Stepped,
    Stage::ClippedStepped,
    Stage::Updated,
];

/// How the state is loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Scaler,
    ScalerPart,
    Joined,
    JoinedPart,
}

const WAYS: [Way; 4] = [Way::Scaler, Way::ScalerPart, Way::Joined, Way::JoinedPart];

/// The optimizer of an `AmpOptimizer`, to drive its scaler call by call.
struct Twin(OptimizerId, Sgd);

impl Optimizer for Twin {
    fn id(&self) -> &OptimizerId {
        &self.0
    }
    fn parameters(&self) -> &[Parameter] {
        self.1.parameters()
    }
    fn step(&mut self, inputs: &StepInputs) -> Result<()> {
        self.1.step(inputs)
    }
}

/// 256 times the scale that is restored. One overflow between two growths is tolerated.
fn config() -> AmpConfig {
    AmpConfig {
        init_scale: 1024.0,
        growth_interval: 100,
        hysteresis: 2,
        refill: Refill::Growth,
        ..AmpConfig::default()
    }
}

struct Run {
    weight: Parameter,
    joined: AmpOptimizer<Sgd>,
    twin: Twin,
    saved: AmpOptimizerState,
}

impl Run {
    /// A weight of 1, and a saved state in which the scale is 4 after three clean updates and a tolerated overflow.
    fn new(context: &Context, config: AmpConfig) -> Self {
        let weight = parameter(context, "w", &[1f32]);
        let joined = AmpOptimizer::new(sgd(&[&weight], 1.0), config).unwrap();
        let twin = Twin(joined.optimizer().id().clone(), sgd(&[&weight], 1.0));
        let mut saved = joined.state_dict().unwrap();
        saved.scaler = ScalerState {
            scale: Some(4.0),
            growth_tracker: Some(3),
            overflows: Some(1),
            ..saved.scaler
        };
        Self {
            weight,
            joined,
            twin,
            saved,
        }
    }

    fn scaler(&self) -> &GradScaler {
        self.joined.scaler()
    }

    /// A gradient of this value, scaled, marked or not.
    fn give(&self, gradient: f32, tagged: bool) {
        let context = self.weight.value().context();
        let scaled = self.scaler().scale(&tensor(context, &[gradient])).unwrap();
        let tag = self.scaler().tag().filter(|_| tagged);
        self.weight.set_scaled_grad(scaled, tag).unwrap();
    }

    fn advance(&mut self, stage: Stage) {
        let (scaler, twin) = (self.joined.scaler_mut(), &mut self.twin);
        if stage == Stage::Checked {
            scaler.check(twin).unwrap();
        }
        if [Stage::Unscaled, Stage::UnscaledClipped].contains(&stage) {
            scaler.unscale(twin).unwrap();
        }
        if [
            Stage::Clipped,
            Stage::UnscaledClipped,
            Stage::ClippedStepped,
        ]
        .contains(&stage)
        {
            scaler.clip_grad_norm(twin, 1e-3).unwrap();
        }
        if [Stage::Stepped, Stage::ClippedStepped, Stage::Updated].contains(&stage) {
            let _ = scaler.step(twin).unwrap();
        }
        if stage == Stage::Updated {
            scaler.update().unwrap();
        }
    }

    /// Loads the saved state, and gives the weight its saved value.
    fn restore(&mut self, way: Way) {
        let mut one = Checkpoint::new();
        match way {
            Way::Scaler => {
                let scaler = self.joined.scaler_mut();
                scaler.load_state_dict(&self.saved.scaler).unwrap();
            }
            Way::Joined => self.joined.load_state_dict(&self.saved).unwrap(),
            Way::ScalerPart => {
                let context = self.weight.value().context();
                let mut from = GradScaler::new(context, config()).unwrap();
                from.load_state_dict(&self.saved.scaler).unwrap();
                one.add_scaler(&from).unwrap();
                let restore = one.restore().scaler(self.joined.scaler_mut()).unwrap();
                restore.finish().unwrap();
            }
            Way::JoinedPart => {
                let context = self.weight.value().context();
                let mut from = Self::new(context, config());
                from.joined.load_state_dict(&self.saved).unwrap();
                one.add_amp_optimizer(&from.joined).unwrap();
                let restore = one.restore().amp_optimizer(&mut self.joined).unwrap();
                restore.finish().unwrap();
            }
        }
        self.weight.value().fill(1.0).unwrap();
    }

    /// The next step: as a whole for an `AmpOptimizer`.
    fn step(&mut self, way: Way) -> Result<bool> {
        let outcome = match way {
            Way::Scaler | Way::ScalerPart => {
                let outcome = self.joined.scaler_mut().step(&mut self.twin)?;
                self.joined.scaler_mut().update()?;
                outcome
            }
            Way::Joined | Way::JoinedPart => self.joined.step()?,
        };
        outcome.is_applied()
    }

    /// Scale, growth tracker and tolerated overflows.
    fn scale(&self) -> (f64, u32, u32) {
        let state = self.scaler().state_dict().unwrap();
        (
            state.scale.unwrap(),
            state.growth_tracker.unwrap(),
            state.overflows.unwrap(),
        )
    }
}

/// Refused by the name of the weight.
#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: Result<T>, what: &str) {
    match outcome {
        Err(Error::InvalidArgument { reason, .. }) => {
            assert!(reason.contains("the gradient of `w`"), "{reason}");
            assert!(reason.contains(what), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn whatever_was_under_way_the_next_step_is_that_of_the_saved_training() {
    let context = context();
    for stage in STAGES {
        for (abandoned, tagged, kept) in [0.5, INF, f32::NAN].into_iter().flat_map(|gradient| {
            let flags = [(false, false), (false, true), (true, false), (true, true)];
            flags.map(|(tagged, kept)| (gradient, tagged, kept))
        }) {
            for way in WAYS {
                let what = format!("{stage:?}, {abandoned}, tagged {tagged}, kept {kept}, {way:?}");
                let mut run = Run::new(&context, config());
                run.give(abandoned, tagged);
                run.advance(stage);
                run.restore(way);
                // What the abandoned iteration found counts nowhere.
                assert_eq!(run.scale(), (4.0, 3, 1), "{what}");
                let stats = run.scaler().stats().unwrap();
                assert_eq!(stats.skipped_in_a_row, 0, "{what}");
                assert_eq!((stats.last_good_scale, stats.alarm), (None, None), "{what}");
                if let Some(flag) = run.scaler().found_inf(&run.twin) {
                    assert_eq!(flag.item::<f32>().unwrap(), 0.0, "{what}");
                }
                let nothing = misuse(run.joined.scaler_mut().update());
                assert_eq!(nothing, ScalerMisuse::NothingToUpdate, "{what}");
                if kept {
                    refused(run.step(way), "before the scaler's state was loaded");
                    assert_eq!(run.scale(), (4.0, 3, 1), "{what}");
                    assert_eq!(value::<f32>(&run.weight), [1.0], "{what}");
                    run.joined.zero_grad();
                }
                run.give(0.5, tagged);
                assert!(run.step(way).unwrap(), "{what}");
                assert_eq!(value::<f32>(&run.weight), [0.5], "{what}");
                assert_eq!(run.scale(), (4.0, 4, 1), "{what}");
                // The saved overflow counts: the next one is not tolerated.
                run.give(INF, tagged);
                assert!(!run.step(way).unwrap(), "{what}");
                assert_eq!(run.scale(), (2.0, 0, 2), "{what}");
            }
        }
    }
}

#[test]
fn each_call_refuses_gradients_from_before() {
    let context = context();
    type Call = fn(&mut GradScaler, &Twin) -> Result<()>;
    let calls: [Call; 3] = [
        |scaler, twin| scaler.check(twin),
        |scaler, twin| scaler.unscale(twin),
        |scaler, twin| scaler.clip_grad_norm(twin, 1.0).map(drop),
    ];
    for call in calls {
        for stage in STAGES {
            let mut run = Run::new(&context, config());
            run.give(0.5, false);
            run.advance(stage);
            run.restore(Way::Scaler);
            // A term from before stays one when others are added to it.
            if stage == Stage::Ready {
                let term = run.scaler().scale(&tensor(&context, &[0.5f32])).unwrap();
                run.weight.accumulate_grad(term).unwrap();
            }
            let outcome = call(run.joined.scaler_mut(), &run.twin);
            refused(outcome, "before the scaler's state was loaded");
            // Updates later it is no newer.
            run.give(0.0, false);
            run.step(Way::Scaler).unwrap();
            call(run.joined.scaler_mut(), &run.twin).unwrap();
        }
    }
}

#[test]
fn optimizers_that_come_later_are_told_too() {
    let context = context();
    for skip_policy in [SkipPolicy::Independent, SkipPolicy::AllOrNone] {
        let config = AmpConfig {
            skip_policy,
            ..config()
        };
        let mut run = Run::new(&context, config);
        run.give(INF, true);
        run.advance(Stage::Stepped);
        let later = parameter(&context, "w", &[1f32]);
        set_grad(&later, &[2f32]);
        run.restore(Way::Scaler);
        let mut second = sgd(&[&later], 1.0);
        let scaler = run.joined.scaler_mut();
        refused(scaler.step(&mut second), "was loaded");
        // Of all or none, a step from before counts as none.
        set_grad(&later, &[2f32]);
        assert!(scaler.step(&mut second).unwrap().is_applied().unwrap());
        scaler.update().unwrap();
        assert_eq!(value::<f32>(&later), [0.5]);
        assert_eq!(run.scale(), (4.0, 4, 1));
    }
}

#[test]
fn a_loss_that_was_scaled_before_is_known_by_its_tag() {
    let context = context();
    let mut run = Run::new(&context, config());
    let loss = || tensor(&context, &[0.5f32]);
    let (before, tag) = (run.scaler().scale(&loss()).unwrap(), run.scaler().tag());
    run.restore(Way::Joined);
    // Backpropagated after it.
    run.weight.set_scaled_grad(before.clone(), tag).unwrap();
    refused(run.step(Way::Scaler), "another scale");
    run.weight.zero_grad();
    // Calls that take the tag themselves know that no loss was scaled since.
    let scaled_before = "a loss scaled before";
    refused(
        run.scaler().accumulate(&run.weight, before.clone()),
        scaled_before,
    );
    refused(run.joined.accumulate(&run.weight, before), scaled_before);
    assert!(run.weight.grad().is_none());
    let after = run.scaler().scale(&loss()).unwrap();
    run.joined.accumulate(&run.weight, after.clone()).unwrap();
    run.weight.zero_grad();
    run.scaler().accumulate(&run.weight, after).unwrap();
    assert!(run.step(Way::Joined).unwrap());
    assert_eq!(value::<f32>(&run.weight), [0.5]);

    // The same by a backward pass.
    let logits = Tensor::from_slice(&context, [1, 2], &[0f32, 0.0]).unwrap();
    let labels = tensor(&context, &[0u32]);
    let wide = Parameter::new("w", Tensor::zeros(&context, [1, 2], DType::F32).unwrap()).unwrap();
    let mut joined = AmpOptimizer::new(sgd(&[&wide], 1.0), config()).unwrap();
    let loss = ops::softmax_cross_entropy(&logits, &labels).unwrap();
    let before = joined.backward(&loss).unwrap();
    joined
        .load_state_dict(&joined.state_dict().unwrap())
        .unwrap();
    refused(joined.accumulate(&wide, before), scaled_before);
    let after = joined.backward(&loss).unwrap();
    joined.accumulate(&wide, after).unwrap();
    let _ = joined.step().unwrap();
    assert_eq!(value::<f32>(&wide), [0.5, -0.5]);
}

#[test]
fn what_was_found_where_a_gradient_was_made_does_not_count() {
    // Checked as it was summed, and dropped: the next sum in the same memory is checked anew.
    let context = context();
    let mut run = Run::new(&context, config());
    let term = |run: &Run, gradient: f32| {
        let scaled = run.scaler().scale(&tensor(&context, &[gradient])).unwrap();
        run.scaler().accumulate(&run.weight, scaled).unwrap();
    };
    run.weight.accumulate_in_f32().unwrap();
    [INF, 1.0].iter().for_each(|gradient| term(&run, *gradient));
    run.restore(Way::Scaler);
    refused(run.step(Way::Scaler), "was loaded");
    run.weight.zero_grad();
    [0.25, 0.25]
        .iter()
        .for_each(|gradient| term(&run, *gradient));
    assert!(run.step(Way::Scaler).unwrap());
    assert_eq!(
        (value::<f32>(&run.weight), run.scale()),
        (vec![0.5], (4.0, 4, 1))
    );
}

#[test]
fn alarms_are_those_of_the_restored_training() {
    let context = context();
    let config = AmpConfig {
        init_scale: 1.0,
        min_scale: 1.0,
        hysteresis: 1,
        nan_policy: NanPolicy::ErrorAfter(3),
        alarm_interval: 1,
        ..config()
    };
    let mut run = Run::new(&context, config);
    let step = |run: &mut Run, gradient: f32| {
        run.give(gradient, true);
        let _ = run.joined.scaler_mut().step(&mut run.twin).unwrap();
        context.synchronize().unwrap();
        run.joined.scaler_mut().update()
    };
    // Two NaN are no alarm, at the floor they are one. A copy that tells of it is on its way.
    for gradient in [0.0, f32::NAN] {
        step(&mut run, gradient).unwrap();
    }
    assert_eq!(
        run.scaler().alarm().unwrap().unwrap().kind,
        AlarmKind::AtFloor
    );
    context.synchronize().unwrap();
    run.restore(Way::Scaler);
    assert_eq!(run.scaler().alarm().unwrap(), None);
    // Its floor is 1, and it is at 4.
    step(&mut run, f32::NAN).unwrap();
    step(&mut run, f32::NAN).unwrap();
    let stats = run.scaler().stats().unwrap();
    assert_eq!(
        (stats.scale, stats.skipped_in_a_row, stats.alarm),
        (1.0, 2, None)
    );
    // The totals are those of the scaler.
    assert_eq!((stats.steps, stats.skipped, stats.updates), (4, 3, 4));
    let history: Vec<_> = stats
        .scale_history
        .iter()
        .map(|change| change.scale)
        .collect();
    assert_eq!(history, [2.0, 1.0]);
    step(&mut run, f32::NAN).unwrap();
    context.synchronize().unwrap();
    match step(&mut run, 0.0) {
        Err(Error::ScalerAlarm(alarm)) => {
            assert_eq!(alarm.kind, AlarmKind::NaN { in_a_row: 3 });
            assert_eq!((alarm.scale, alarm.last_good_scale), (1.0, None));
            let told = alarm.to_string();
            assert!(
                told.ends_with("; no step was applied since the start or the last restore"),
                "{told}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_alarm_tells_the_restored_scale() {
    let context = context();
    let config = AmpConfig {
        init_scale: 64.0,
        min_scale: 1.0,
        hysteresis: 1,
        alarm_interval: 1,
        ..config()
    };
    let mut run = Run::new(&context, config);
    let step = |run: &mut Run| {
        run.give(INF, true);
        let _ = run.joined.scaler_mut().step(&mut run.twin).unwrap();
        context.synchronize().unwrap();
        let updated = run.joined.scaler_mut().update();
        context.synchronize().unwrap();
        updated
    };
    step(&mut run).unwrap();
    run.saved.scaler.min_scale = Some(4.0);
    run.restore(Way::Scaler);
    // At its floor, the restored scale does not change.
    step(&mut run).unwrap();
    match step(&mut run) {
        Err(Error::ScalerAlarm(alarm)) => {
            assert_eq!((alarm.kind, alarm.scale), (AlarmKind::AtFloor, 4.0));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn outcomes_from_before_can_still_be_asked() {
    let context = context();
    let mut run = Run::new(&context, config());
    run.give(INF, true);
    let skipped = run.joined.scaler_mut().step(&mut run.twin).unwrap();
    assert_eq!(skipped.poll().unwrap(), None);
    run.restore(Way::Scaler);
    assert!(matches!(skipped.poll().unwrap(), Some(Outcome::Skipped(_))));
    run.give(0.5, true);
    let applied = run.joined.scaler_mut().step(&mut run.twin).unwrap();
    run.joined.scaler_mut().update().unwrap();
    assert!(applied.is_applied().unwrap() && !skipped.is_applied().unwrap());
}

#[test]
fn a_graph_goes_on_with_the_restored_scale() {
    let context = context();
    for stage in STAGES {
        let mut run = Run::new(&context, config());
        let gradient = Tensor::zeros(&context, [1], DType::F32).unwrap();
        run.scaler().scale(&gradient).unwrap();
        run.weight.set_grad(gradient.clone()).unwrap();
        let step = |run: &mut Run| {
            run.joined.scaler_mut().clip_grad_norm(&run.twin, 100.0)?;
            let _ = run.joined.scaler_mut().step(&mut run.twin)?;
            run.joined.scaler_mut().update()
        };
        step(&mut run).unwrap();
        let graph = context.stream().capture(|| step(&mut run)).unwrap();
        gradient.fill(f64::INFINITY).unwrap();
        run.advance(stage);
        run.restore(Way::Scaler);
        for (scaled, weight, scale) in [
            (2.0, 0.5, (4.0, 4, 1)),
            (f64::INFINITY, 0.5, (2.0, 0, 2)),
            (1.0, 0.0, (2.0, 1, 2)),
        ] {
            gradient.fill(scaled).unwrap();
            // SAFETY: the scaler, the weight and its gradient live on.
            unsafe { graph.launch(context.stream()) }.unwrap();
            assert_eq!(value::<f32>(&run.weight), [weight], "{stage:?}");
            assert_eq!(run.scale(), scale, "{stage:?}");
        }
        // Eager steps go on where the replays are, with a gradient that is set anew.
        refused(run.step(Way::Scaler), "was loaded");
        run.weight.set_grad(gradient).unwrap();
        assert!(run.step(Way::Scaler).unwrap());
        assert_eq!(value::<f32>(&run.weight), [-0.5], "{stage:?}");
    }
}

#[test]
fn a_restore_that_fails_leaves_the_iteration_as_it_was() {
    let inner = device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
    for stage in [
        Stage::Checked,
        Stage::Clipped,
        Stage::Unscaled,
        Stage::Stepped,
    ] {
        let mut failures = 0;
        for nth in 1.. {
            let mut run = Run::new(&context, config());
            run.give(INF, true);
            run.advance(stage);
            let tag = run.scaler().tag();
            faults.fail_nth(None, nth);
            let outcome = run.joined.load_state_dict(&run.saved);
            if faults.disarm() > 0 {
                outcome.unwrap();
                assert_eq!(run.scale(), (4.0, 3, 1), "{stage:?}");
                break;
            }
            outcome.unwrap_err();
            failures += 1;
            let what = format!("{stage:?}, call {nth}");
            let mid = misuse(run.scaler().state_dict());
            assert_eq!(mid, ScalerMisuse::MidIteration, "{what}");
            assert_eq!(flag(run.scaler(), &run.twin), 1.0, "{what}");
            assert_eq!(run.scaler().tag(), tag, "{what}");
            // It ends as it would have: skipped, with its gradient, and its overflow counts.
            let scaler = run.joined.scaler_mut();
            if stage != Stage::Stepped {
                assert!(
                    !scaler.step(&mut run.twin).unwrap().is_applied().unwrap(),
                    "{what}"
                );
            }
            scaler.update().unwrap();
            assert_eq!(run.scale(), (1024.0, 0, 1), "{what}");
            let stats = run.scaler().stats().unwrap();
            assert_eq!((stats.skipped, stats.skipped_in_a_row), (1, 1), "{what}");
        }
        assert!(failures > 20, "{failures}");
    }
}

#[test]
fn a_checking_scaler_is_restored_the_same_way() {
    let context = context();
    let check_only = AmpConfig::bf16();
    for stage in STAGES {
        for abandoned in [0.5, INF] {
            let weight = parameter(&context, "w", &[1f32]);
            let mut optimizer = sgd(&[&weight], 1.0);
            let mut scaler = scaler_with(&context, check_only.clone());
            let saved = scaler.state_dict().unwrap();
            set_grad(&weight, &[abandoned]);
            match stage {
                Stage::Ready => {}
                Stage::Checked => scaler.check(&optimizer).unwrap(),
                Stage::Clipped => drop(scaler.clip_grad_norm(&optimizer, 1e-3).unwrap()),
                Stage::Unscaled => scaler.unscale(&optimizer).unwrap(),
                _ => drop(scaler.step(&mut optimizer).unwrap()),
            }
            scaler.load_state_dict(&saved).unwrap();
            weight.value().fill(1.0).unwrap();
            assert_eq!(scaler.state_dict().unwrap(), saved);
            refused(scaler.step(&mut optimizer), "was loaded");
            set_grad(&weight, &[0.5f32]);
            assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
            scaler.update().unwrap();
            assert_eq!(value::<f32>(&weight), [0.5], "{stage:?}");
        }
    }
}
