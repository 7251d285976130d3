//! Case 65: a step in a graph.

use kitsune::amp::{AmpConfig, Outcome, StepOutcome};
use kitsune::optim::{AdamW, AdamWConfig};
use kitsune::{DType, Tensor, f16};

use super::config;
use crate::support::amp::{context, ones, scaler_with, sgd, value};

#[test]
fn case_65_graph_capture() {
    let gradients = [4.0, f32::INFINITY, -2.0, f32::NAN, 8.0, 8.0];
    let run = |capture: bool, clip: bool, unscale: bool| {
        let context = context();
        let weight = ones(&context, "w", &[f16::ONE; 5]);
        let slot = Tensor::zeros(&context, [5], DType::F16).unwrap();
        weight.set_grad(slot.clone()).unwrap();
        let mut optimizer = AdamW::new(vec![weight.clone()], AdamWConfig::default()).unwrap();
        let config = AmpConfig {
            timing: true,
            ..config(16.0, 2)
        };
        let mut scaler = scaler_with(&context, config);
        let mut norms = Vec::new();
        let mut step = || -> kitsune::Result<()> {
            if unscale {
                scaler.unscale(&optimizer)?;
            }
            if clip {
                norms.push(scaler.clip_grad_norm(&optimizer, 0.5)?);
            }
            let _ = scaler.step(&mut optimizer)?;
            scaler.update()
        };
        // The first step makes all memory.
        step().unwrap();
        let graph = capture.then(|| context.stream().capture(&mut step).unwrap());
        let before = context.pool().stats().num_device_alloc;
        for gradient in gradients {
            slot.fill(f64::from(gradient)).unwrap();
            match &graph {
                // SAFETY: the graph touches the scaler, the optimizer, the weight, its gradient and the
                // norms, all of which are alive.
                Some(graph) => unsafe { graph.launch(context.stream()) }.unwrap(),
                None => step().unwrap(),
            }
        }
        assert_eq!(context.pool().stats().num_device_alloc, before);
        let moments = [optimizer.first_moment(0), optimizer.second_moment(0)];
        let moments = moments.map(|moment| moment.unwrap().to_vec::<f32>().unwrap());
        let master = optimizer.master_weight(0).unwrap().to_vec::<f32>().unwrap();
        let steps = optimizer.step_counts().to_vec::<u32>().unwrap();
        let stats = scaler.stats().unwrap();
        let counts = (
            stats.steps,
            stats.skipped,
            stats.growths,
            stats.backoffs,
            stats.scale,
        );
        (value::<f16>(&weight), master, moments, steps, counts)
    };
    for (clip, unscale) in [(false, false), (true, false), (false, true), (true, true)] {
        let eager = run(false, clip, unscale);
        assert_eq!((&eager.3, eager.4), (&vec![5], (7, 2, 2, 2, 16.0)));
        assert_eq!(
            run(true, clip, unscale),
            eager,
            "clip {clip}, unscale {unscale}"
        );
    }
}

#[test]
fn outcomes_are_learnt_without_waiting() {
    let context = context();
    let weight = ones(&context, "w", &[4f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler_with(&context, config(4.0, 2000));
    let mut step = |gradient: f64| {
        weight.grad().unwrap().fill(gradient).unwrap();
        let outcome = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        outcome
    };
    let outcomes: [StepOutcome; 2] = [step(4.0), step(f64::NAN)];
    let poll = |index: usize| outcomes[index].poll().unwrap();
    // The first question only sets out.
    assert_eq!(poll(0), None);
    context.synchronize().unwrap();
    assert_eq!(poll(0), Some(Outcome::Applied));
    let Some(Outcome::Skipped(report)) = poll(1) else {
        panic!("known from the same copy");
    };
    assert_eq!((report.step, report.scale), (2, 4.0));
    // A later step is not in that copy.
    let later = step(1.0);
    assert_eq!(later.poll().unwrap(), None);
    context.synchronize().unwrap();
    assert_eq!(later.poll().unwrap(), Some(Outcome::Applied));
}
