//! What a saved state of an optimizer is held against: the rule and its flags, names of parameters, groups; and which
//! settings cannot work.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support::amp::boxed::Boxed;
use crate::support::amp::{context, parameter, set_grad, value};
use kitsune::amp::{AmpConfig, AmpOptimizer, ClipState};
use kitsune::checkpoint::Checkpoint;
use kitsune::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, Decay, Ema, MasterWeights, Moments, Optimizer,
    OptimizerState, ParamGroup, Parameter, Schedule, Sgd, SgdConfig,
};
use kitsune::{Context, DType, Error, Result, Tensor, bf16};

/// A change of a configuration.
type Change<'a> = &'a dyn Fn(&mut AdamWConfig);

/// The key and the reason of a refusal.
fn refused<T: std::fmt::Debug>(outcome: Result<T>) -> (String, String) {
    match outcome {
        Err(Error::InvalidState { key, reason }) => (key, reason),
        Err(Error::InvalidConfig { key, reason }) => (key.to_owned(), reason),
        Err(Error::InvalidArgument { op, reason }) => (op.to_owned(), reason),
        other => panic!("not refused: {other:?}"),
    }
}

fn weights(context: &Context, names: &[&str]) -> Vec<Parameter> {
    let weight = |name: &&str| parameter(context, name, &[1f32, 2.0]);
    names.iter().map(weight).collect()
}

#[test]
fn a_state_of_another_rule_is_refused_by_both_names() {
    let context = context();
    let weights = || weights(&context, &["w"]);
    let adamw = AdamW::new(weights(), AdamWConfig::default()).unwrap();
    let mut adam = Adam::new(weights(), AdamConfig::default()).unwrap();
    let mut sgd = Sgd::new(weights(), SgdConfig::default()).unwrap();
    let state = adamw.state_dict().unwrap();
    assert_eq!(state.rule.as_deref(), Some("AdamW"));
    assert!(state.lacks().is_empty());
    let told = (
        "rule".to_owned(),
        "saved from AdamW, this is Adam".to_owned(),
    );
    assert_eq!(refused(adam.load_state_dict(&state)), told);
    let (key, reason) = refused(sgd.load_state_dict(&state));
    assert_eq!((&*key, &*reason), ("rule", "saved from AdamW, this is Sgd"));
    assert_eq!(adam.config().weight_decay, 0.0);

    // An optimizer that does not say is not compared; nor is a state that does not.
    let mut boxed = Boxed(Box::new(
        Adam::new(weights(), AdamConfig::default()).unwrap(),
    ));
    boxed.load_state_dict(&state).unwrap();
    let unknown = OptimizerState {
        rule: None,
        ..state
    };
    assert_eq!(unknown.lacks(), ["rule", "flags"]);
    adam.load_state_dict(&unknown).unwrap();
    assert_eq!(adam.config().weight_decay, 0.01);
}

#[test]
fn flags_that_differ_are_refused_with_both_values() {
    let context = context();
    let weights = || {
        let wide = parameter(&context, "w", &[bf16::ONE; 2]);
        vec![wide]
    };
    let adamw = |change: &dyn Fn(&mut AdamWConfig)| {
        let mut config = AdamWConfig::default();
        change(&mut config);
        AdamW::new(weights(), config).unwrap()
    };
    let plain = adamw(&|_| {}).state_dict().unwrap();
    let load = |change: &dyn Fn(&mut AdamWConfig)| adamw(change).load_state_dict(&plain);
    load(&|config| config.learning_rate = 0.5).unwrap();
    let (key, reason) = refused(load(&|config| config.seed = 7));
    assert_eq!(key, "seed");
    assert_eq!(
        reason,
        "group 0: saved from AdamW with seed = 0; this is AdamW with seed = 7"
    );
    let cases: [(Change<'_>, &str, [&str; 2]); 3] = [
        (
            &|config| config.amsgrad = true,
            "amsgrad",
            ["false", "true"],
        ),
        (
            &|config| config.moments = Moments::Bf16,
            "moments",
            ["full", "bf16"],
        ),
        (
            &|config| config.master_weights = MasterWeights::Split,
            "master_weights",
            ["f32", "split"],
        ),
    ];
    for (change, flag, [saved, here]) in cases {
        let (key, reason) = refused(load(change));
        assert_eq!(key, flag);
        let told = format!(
            "group 0: saved from AdamW with {flag} = {saved}; this is AdamW with {flag} = {here}"
        );
        assert_eq!(reason, told);
    }
    let sgd = |nesterov| {
        let config = SgdConfig {
            momentum: 0.5,
            nesterov,
            ..SgdConfig::default()
        };
        Sgd::new(weights(), config).unwrap()
    };
    for nesterov in [false, true] {
        let state = sgd(nesterov).state_dict().unwrap();
        sgd(nesterov).load_state_dict(&state).unwrap();
        let (key, reason) = refused(sgd(!nesterov).load_state_dict(&state));
        let told = format!(
            "group 0: saved from Sgd with nesterov = {nesterov}; this is Sgd with nesterov = {}",
            !nesterov
        );
        assert_eq!((key, reason), ("nesterov".to_owned(), told));
    }
}

#[test]
fn masters_of_f32_parameters_are_no_flag() {
    let context = context();
    let adamw = |master_weights| {
        let config = AdamWConfig {
            master_weights,
            ..AdamWConfig::default()
        };
        AdamW::new(weights(&context, &["w"]), config).unwrap()
    };
    let state = adamw(MasterWeights::F32).state_dict().unwrap();
    adamw(MasterWeights::Off).load_state_dict(&state).unwrap();
}

#[test]
fn settings_are_restored_or_kept_by_name() {
    let context = context();
    let sgd = |learning_rate, momentum| {
        let config = SgdConfig {
            learning_rate,
            momentum,
            ..SgdConfig::default()
        };
        Sgd::new(weights(&context, &["w"]), config).unwrap()
    };
    let (saved, mut here) = (sgd(0.5, 0.25), sgd(0.125, 0.75));
    let state = saved.state_dict().unwrap();
    here.load_state_dict_keeping(&state, &["learning_rate"])
        .unwrap();
    let config = here.config();
    assert_eq!((config.learning_rate, config.momentum), (0.125, 0.25));
    let (key, reason) = refused(here.load_state_dict_keeping(&state, &["epsilon"]));
    assert_eq!(key, "epsilon");
    assert!(
        reason.contains("learning_rate, momentum, weight_decay"),
        "{reason}"
    );
    here.load_state_dict(&state).unwrap();
    assert_eq!(here.config(), saved.config());

    let mut file = Checkpoint::new();
    file.add_optimizer("first", &saved).unwrap();
    let mut here = sgd(0.125, 0.75);
    let restore = file.restore().keeping_settings(["momentum"]);
    let restore = restore.optimizer("first", &mut here).unwrap();
    assert!(restore.lacks().is_empty());
    restore.finish().unwrap();
    let config = here.config();
    assert_eq!((config.learning_rate, config.momentum), (0.5, 0.75));
    let restore = file.restore().keeping_settings(["clip"]);
    let restore = restore.optimizer("first", &mut here).unwrap();
    assert_eq!(refused(restore.finish()).0, "clip");
}

#[test]
fn clip_schedule_and_decay_are_restored_or_kept_by_name() {
    let context = context();
    let form = |steps| Schedule {
        warmup: 2,
        decay: Decay::Linear { steps, floor: 0.5 },
    };
    let new = |rate: f64, clip: Option<f64>, steps, decay| {
        let config = SgdConfig {
            learning_rate: rate,
            ..SgdConfig::default()
        };
        let sgd = Sgd::new(weights(&context, &["w"]), config).unwrap();
        let mut joined = AmpOptimizer::new(sgd, AmpConfig::default()).unwrap();
        if let Some(max_norm) = clip {
            joined = joined.with_clip(max_norm).unwrap();
        }
        let joined = joined.with_schedule(form(steps)).unwrap();
        joined.with_ema(decay).unwrap()
    };
    let state = new(0.5, Some(4.0), 8, 0.25).state_dict().unwrap();
    assert_eq!(state.clip, Some(ClipState::MaxNorm(4.0)));
    assert!(state.lacks().is_empty());
    let mut here = new(0.25, None, 8, 0.75);
    here.load_state_dict(&state).unwrap();
    assert_eq!(here.state_dict().unwrap(), state);

    let mut other = new(0.25, Some(f64::INFINITY), 9, 0.75);
    let (key, reason) = refused(other.load_state_dict(&state));
    assert_eq!(key, "schedule/form");
    assert!(
        reason.contains("steps: 8") && reason.contains("steps: 9"),
        "{reason}"
    );
    let kept = ["clip", "schedule", "ema_decay", "learning_rate"];
    other.load_state_dict_keeping(&state, &kept).unwrap();
    let after = other.state_dict().unwrap();
    assert_eq!(after.clip, Some(ClipState::Unlimited));
    assert_eq!(after.ema.unwrap().decay, 0.75);
    let schedule = after.schedule.unwrap();
    assert_eq!(schedule.form, Some(form(9)));
    assert_eq!(schedule.base_rates, [0.25]);
    assert_eq!(
        refused(other.load_state_dict_keeping(&state, &["momenta"])).0,
        "momenta"
    );

    // In a file as well, each form of the limit.
    for clip in [None, Some(2.0), Some(f64::INFINITY)] {
        let saved = new(0.5, clip, 8, 0.25);
        let mut file = Checkpoint::new();
        file.add_amp_optimizer(&saved).unwrap();
        let mut here = new(0.25, Some(1.0), 8, 0.25);
        let restore = file.restore().amp_optimizer(&mut here).unwrap();
        assert!(restore.lacks().is_empty(), "{:?}", restore.lacks());
        restore.finish().unwrap();
        assert_eq!(here.state_dict().unwrap(), saved.state_dict().unwrap());
    }
}

/// One step with the gradient 1, then the state.
fn stepped(names: &[&str], context: &Context) -> OptimizerState {
    let weights = weights(context, names);
    for (index, weight) in weights.iter().enumerate() {
        set_grad(weight, &[index as f32 + 1.0; 2]);
    }
    let mut optimizer = AdamW::new(weights, AdamWConfig::default()).unwrap();
    optimizer.step_unscaled().unwrap();
    optimizer.state_dict().unwrap()
}

#[test]
fn parameters_are_found_by_name_in_any_order() {
    let context = context();
    let state = stepped(&["a", "b", "c"], &context);
    let weights = weights(&context, &["c", "a", "b"]);
    let mut optimizer = AdamW::new(weights, AdamWConfig::default()).unwrap();
    optimizer.load_state_dict(&state).unwrap();
    // (1 − β₁) times the gradients 3, 1 and 2.
    for (index, expected) in [0.3f32, 0.1, 0.2].into_iter().enumerate() {
        let moment = optimizer.first_moment(index).unwrap();
        let moment = moment.to_vec::<f32>().unwrap();
        assert!((moment[0] - expected).abs() < 1e-6, "{index}: {moment:?}");
    }
    assert_eq!(optimizer.state_dict().unwrap().tensors, state.tensors);
}

#[test]
fn everything_that_does_not_fit_is_named_and_nothing_else() {
    let context = context();
    let state = stepped(&["a", "b"], &context);
    let load = |weights: Vec<Parameter>| {
        let mut optimizer = AdamW::new(weights, AdamWConfig::default()).unwrap();
        refused(optimizer.load_state_dict(&state))
    };
    let (key, reason) = load(weights(&context, &["a", "b", "c"]));
    assert_eq!(key, "c");
    assert_eq!(reason, "the saved state has no such parameter");
    let (key, reason) = load(weights(&context, &["b"]));
    assert_eq!(key, "a");
    assert_eq!(reason, "was saved, but there is no such parameter here");
    // One that is missing, one of another shape, one that is not here.
    let mut mixed = weights(&context, &["d"]);
    mixed.push(parameter(&context, "a", &[0f32; 3]));
    let (key, reason) = load(mixed);
    assert_eq!(key, "d");
    assert_eq!(
        reason,
        "the saved state has no such parameter; `a/first_moment`: saved as [2] of f32, but is [3] of f32 here; `b`: \
         was saved, but there is no such parameter here"
    );
    // No more than ten are told.
    let names: Vec<_> = (0..14).map(|index| format!("n{index:02}")).collect();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let (key, reason) = load(weights(&context, &names));
    assert_eq!(key, "n00");
    assert!(
        reason.contains("`n09`") && !reason.contains("n10"),
        "{reason}"
    );
    assert!(reason.ends_with("; and 6 more"), "{reason}");

    // The same of a model and of averages.
    let mut file = Checkpoint::new();
    let saved = weights(&context, &["a", "b"]);
    file.add_model(&saved).unwrap();
    let ema = Ema::new(&saved, 0.5).unwrap();
    file.add_ema(&ema).unwrap();
    let here = weights(&context, &["c", "b", "d"]);
    let told = "the saved state has no such tensor; `d`: the saved state has no such tensor; `a`: was saved, but \
                there is no such tensor here";
    let model = file.restore().model(&here);
    assert_eq!(refused(model), ("model/c".to_owned(), told.to_owned()));
    let mut ema = Ema::new(&here, 0.5).unwrap();
    let averages = file.restore().ema(&mut ema);
    assert_eq!(refused(averages), ("ema/c".to_owned(), told.to_owned()));
    let reversed = weights(&context, &["b", "a"]);
    let model = file.restore().model(&reversed).unwrap();
    model.ignore("ema").unwrap().finish().unwrap();
}

fn grouped(context: &Context, groups: &[(&[&str], f64)]) -> Sgd {
    let groups = groups.iter().map(|(names, learning_rate)| {
        let config = SgdConfig {
            learning_rate: *learning_rate,
            momentum: 0.5,
            ..SgdConfig::default()
        };
        ParamGroup::new(weights(context, names), config)
    });
    Sgd::with_groups(groups.collect()).unwrap()
}

#[test]
fn a_group_gets_the_settings_that_its_parameters_were_saved_with() {
    let context = context();
    let saved = grouped(
        &context,
        &[(&["a", "b"], 0.5), (&["c"], 0.25), (&["d"], 0.5)],
    );
    let state = saved.state_dict().unwrap();
    let load = |groups: &[(&[&str], f64)], kept: &[&str]| {
        let mut here = grouped(&context, groups);
        here.load_state_dict_keeping(&state, kept)?;
        let rate = |group| here.group_config(group).map(|config| config.learning_rate);
        Ok((0..groups.len()).filter_map(rate).collect::<Vec<_>>())
    };
    let reordered = load(&[(&["d"], 0.0), (&["c"], 0.0), (&["b", "a"], 0.0)], &[]);
    assert_eq!(reordered.unwrap(), [0.5, 0.25, 0.5]);
    let joined = load(&[(&["d", "a", "b"], 0.0), (&["c"], 0.0)], &[]);
    assert_eq!(joined.unwrap(), [0.5, 0.25]);
    let cut = load(
        &[(&["b"], 0.0), (&["a", "d"], 0.0), (&[], 8.0), (&["c"], 0.0)],
        &[],
    );
    assert_eq!(cut.unwrap(), [0.5, 0.5, 8.0, 0.25]);

    let moved: [(&[&str], f64); 2] = [(&["a", "c", "b"], 1.0), (&["d"], 1.0)];
    let (key, reason) = refused(load(&moved, &[]));
    assert_eq!(key, "c");
    assert_eq!(
        reason,
        "is in group 0 here, but was saved in group 1, with learning_rate 0.25; `a` was in group 0, with 0.5"
    );
    assert_eq!(load(&moved, &["learning_rate"]).unwrap(), [1.0, 1.0]);

    // A schedule multiplies what belongs to the parameters, too.
    let decay = Decay::Constant;
    let amp = |sgd| {
        let joined = AmpOptimizer::new(sgd, AmpConfig::default()).unwrap();
        joined.with_schedule(Schedule { warmup: 4, decay }).unwrap()
    };
    let state = amp(saved).state_dict().unwrap();
    let mut here = amp(grouped(&context, &[(&["c"], 1.0), (&["d", "b", "a"], 1.0)]));
    here.load_state_dict(&state).unwrap();
    let schedule = here.state_dict().unwrap().schedule.unwrap();
    assert_eq!(schedule.base_rates, [0.25, 0.5]);
}

#[test]
fn a_setting_that_the_computation_takes_for_nothing_is_refused() {
    let context = context();
    let f32s = || weights(&context, &["w"]);
    let f64s = || vec![parameter(&context, "w", &[1f64])];
    let new = |weights: Vec<Parameter>, change: &dyn Fn(&mut AdamWConfig)| {
        let mut config = AdamWConfig::default();
        change(&mut config);
        AdamW::new(weights, config).map(|_| ())
    };
    let cases: [(&str, Change<'_>); 8] = [
        ("epsilon", &|config| config.epsilon = 1e-50),
        ("epsilon", &|config| config.epsilon = 1e40),
        ("learning_rate", &|config| config.learning_rate = 1e-50),
        ("learning_rate", &|config| config.learning_rate = 1e39),
        // A tenth of it is finite.
        ("learning_rate", &|config| config.learning_rate = 1e38),
        ("weight_decay", &|config| config.weight_decay = 1e-50),
        ("betas", &|config| config.betas.1 = 1.0 - 1e-12),
        ("betas", &|config| config.betas.0 = 1e-60),
    ];
    for (key, change) in cases {
        let (told, reason) = refused(new(f32s(), change));
        assert_eq!(told, key, "{reason}");
        assert!(reason.starts_with("group 0: "), "{reason}");
        new(f64s(), change).unwrap();
        // One that is narrower decides for its group.
        let mut both = f64s();
        both.push(parameter(&context, "half", &[bf16::ONE]));
        assert_eq!(refused(new(both, change)).0, key);
    }
    new(f32s(), &|config| config.epsilon = 0.0).unwrap();
    new(f32s(), &|config| config.epsilon = 1e-45).unwrap();
    new(f32s(), &|config| config.learning_rate = 0.0).unwrap();

    let mut adamw = AdamW::new(f32s(), AdamWConfig::default()).unwrap();
    let before = *adamw.config();
    let changed = adamw.set_settings(0, &[("epsilon", 1e-50)]);
    assert_eq!(refused(changed).0, "epsilon");
    assert_eq!(refused(adamw.set_learning_rate(1e39)).0, "learning_rate");
    let wide = AdamWConfig {
        epsilon: 1e-50,
        ..AdamWConfig::default()
    };
    assert_eq!(refused(adamw.set_group_config(0, wide)).0, "epsilon");
    let mut state = adamw.state_dict().unwrap();
    state.groups[0].settings.insert("epsilon".to_owned(), 1e-50);
    assert_eq!(refused(adamw.load_state_dict(&state)).0, "epsilon");
    assert_eq!(*adamw.config(), before);

    let sgd = |momentum| {
        let config = SgdConfig {
            momentum,
            ..SgdConfig::default()
        };
        Sgd::new(f32s(), config).map(|_| ())
    };
    assert_eq!(refused(sgd(1e-50)).0, "momentum");
    assert_eq!(refused(sgd(1.0 - 1e-12)).0, "momentum");
    sgd(1.5).unwrap();
    let amp = |weights| {
        let sgd = Sgd::new(weights, SgdConfig::default()).unwrap();
        let joined = AmpOptimizer::new(sgd, AmpConfig::default()).unwrap();
        joined.with_clip(1e-50).map(|_| ())
    };
    assert_eq!(refused(amp(f32s())).0, "with_clip");
    amp(f64s()).unwrap();
}

#[test]
fn f64_parameters_take_an_epsilon_that_f32_has_not() {
    let context = context();
    let weight = parameter(&context, "w", &[1f64]);
    set_grad(&weight, &[0f64]);
    let config = AdamWConfig {
        epsilon: 1e-50,
        weight_decay: 0.0,
        ..AdamWConfig::default()
    };
    let mut adamw = AdamW::new(vec![weight.clone()], config).unwrap();
    adamw.step_unscaled().unwrap();
    assert_eq!(value::<f64>(&weight), [1.0]);
}

#[test]
fn parameters_of_one_name_are_refused_when_something_is_made_of_them() {
    let context = context();
    let twice = weights(&context, &["a", "b", "a"]);
    let told = |outcome: Result<()>, op: &str| {
        assert_eq!(
            refused(outcome),
            (op.to_owned(), "two parameters are named `a`".to_owned())
        );
    };
    told(
        AdamW::new(twice.clone(), AdamWConfig::default()).map(|_| ()),
        "AdamW",
    );
    told(
        Sgd::new(twice.clone(), SgdConfig::default()).map(|_| ()),
        "Sgd",
    );
    told(Ema::new(&twice, 0.5).map(|_| ()), "Ema");
    let same = vec![twice[0].clone(), twice[0].clone()];
    let (_, reason) = refused(Sgd::new(same, SgdConfig::default()));
    assert_eq!(reason, "parameter `a` is given twice");
}

#[test]
fn tens_of_thousands_of_tensors_are_made_saved_and_loaded() {
    const TENSORS: usize = 32_000;
    let context = context();
    let flat = Tensor::zeros(&context, [TENSORS], DType::F32).unwrap();
    let weight = |index: usize| {
        let value = flat.narrow(0, index, 1).unwrap();
        Parameter::new(format!("layer.{index}"), value).unwrap()
    };
    let groups = |weights: Vec<Parameter>| {
        let groups = weights.into_iter();
        groups.map(|one| ParamGroup::new(vec![one], SgdConfig::default()))
    };
    let weights: Vec<_> = (0..TENSORS).map(weight).collect();
    let mut sgd = Sgd::with_groups(groups(weights.clone()).collect()).unwrap();
    sgd.set_settings(TENSORS - 1, &[("learning_rate", 0.5)])
        .unwrap();
    let state = sgd.state_dict().unwrap();
    let reversed = weights.into_iter().rev().collect();
    let mut other = Sgd::with_groups(groups(reversed).collect()).unwrap();
    other.load_state_dict(&state).unwrap();
    assert_eq!(other.group_config(0).unwrap().learning_rate, 0.5);
    assert_eq!(other.group_config(1).unwrap().learning_rate, 0.001);
}
