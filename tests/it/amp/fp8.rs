//! Scaling to 8 bits: what comes out, what is counted, that nothing waits, graphs, saved states, misuse.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "replaying a graph is unsafe, and a test fails by panicking"
)]

use crate::support;
use std::sync::Arc;

use kitsune::amp::fp8::{AmaxAlgorithm, Fp8Config, Fp8Scaler, Fp8Scaling, Fp8State, Quantized};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter};
use kitsune::{
    Context, DType, Device, Error, F8E4M3, F8E5M2, HostConfig, Overflow, Tensor, bf16, f16, ops,
};

const TENSORS: [(&str, DType); 2] = [("x", DType::F8E4M3), ("grad", DType::F8E5M2)];

fn device() -> Device {
    support::device::device(HostConfig::default())
}

fn context() -> Context {
    Context::new(&device()).unwrap()
}

fn scaler(context: &Context, config: Fp8Config) -> Fp8Scaler {
    Fp8Scaler::new(context, config, &TENSORS).unwrap()
}

fn tensor(context: &Context, values: &[f32]) -> Tensor {
    Tensor::from_slice(context, [values.len()], values).unwrap()
}

fn codes(quantized: &Quantized) -> Vec<f32> {
    let values = quantized.values().cast(DType::F32).unwrap();
    values.to_vec().unwrap()
}

#[test]
fn numbers_are_scaled_counted_and_come_back() {
    let context = context();
    let mut scaler = scaler(&context, Fp8Config::default());
    let x = tensor(&context, &[3.5, -0.1, 0.0, 0.003]);
    // The first iteration knows nothing yet.
    let first = scaler.quantize("x", &x).unwrap();
    assert_eq!(codes(&first), [3.5, -0.101_562_5, 0.0, 0.003_906_25]);
    scaler.update().unwrap();
    assert_eq!(scaler.scale("x").unwrap(), 128.0);
    let second = scaler.quantize("x", &x.reshape([2, 2]).unwrap()).unwrap();
    assert_eq!(codes(&second), [448.0, -13.0, 0.0, 0.375]);
    assert_eq!(second.inverse_scale().item::<f32>().unwrap(), 1.0 / 128.0);
    let expected = [3.5, -0.101_562_5, 0.0, 0.002_929_687_5];
    let wide = second.dequantize(DType::F32).unwrap();
    assert_eq!(wide.shape()[..], [2, 2]);
    assert_eq!(wide.to_vec::<f32>().unwrap(), expected);
    let half = second.dequantize(DType::Bf16).unwrap();
    assert_eq!(half.to_vec::<bf16>().unwrap(), expected.map(bf16::from_f32));

    // A scale that moves does not touch what was converted with an earlier one.
    let large = tensor(&context, &[1000.0, f32::INFINITY, f32::NAN, 1e-6, -7.0]);
    let saturated = scaler.quantize("x", &large).unwrap();
    scaler.update().unwrap();
    let got = codes(&saturated);
    assert_eq!(
        (got[0], got[1], got[3], got[4]),
        (448.0, 448.0, 0.0, -448.0)
    );
    assert!(got[2].is_nan());
    assert_eq!(
        second
            .dequantize(DType::F32)
            .unwrap()
            .to_vec::<f32>()
            .unwrap(),
        expected
    );
    assert_eq!(scaler.scale("x").unwrap(), 128.0);

    let stats = scaler.stats().unwrap();
    let x = &stats.tensors[0];
    assert_eq!((x.elements, x.overflowed, x.vanished, x.nan), (13, 3, 1, 1));
    assert!(x.amax.is_nan());
    assert_eq!(
        stats.to_string(),
        "x: f8e4m3 at scale 128, amax NaN; of 13 elements 3 overflowed, 1 vanished, 1 are NaN; 1 of 2 updates \
         saw inf or NaN\n\
         grad: f8e5m2 at scale 1, amax 0; of 0 elements 0 overflowed, 0 vanished, 0 are NaN; 0 of 2 updates saw \
         inf or NaN"
    );
}

#[test]
fn overflows_can_stay_to_be_seen() {
    let context = context();
    let config = Fp8Config {
        overflow: Overflow::Infinity,
        ..Fp8Config::default()
    };
    let scaler = scaler(&context, config);
    let values = [f16::MAX, f16::ONE, f16::NEG_INFINITY];
    let x = Tensor::from_slice(&context, [3], &values).unwrap();
    let narrow = scaler
        .quantize("grad", &x)
        .unwrap()
        .values()
        .to_vec::<F8E5M2>()
        .unwrap();
    assert_eq!(
        narrow,
        [F8E5M2::INFINITY, F8E5M2::ONE, F8E5M2::NEG_INFINITY]
    );
    let narrow = scaler
        .quantize("x", &x)
        .unwrap()
        .values()
        .to_vec::<F8E4M3>()
        .unwrap();
    assert!(narrow[0].is_nan() && narrow[2].is_nan());
    let stats = scaler.stats().unwrap();
    assert_eq!(
        [0, 1].map(|place: usize| stats.tensors[place].overflowed),
        [2, 2]
    );
}

#[test]
fn current_scales_come_from_the_tensor_itself() {
    let context = context();
    let config = Fp8Config {
        margin: 1,
        ..Fp8Config::current()
    };
    let mut scaler = scaler(&context, config);
    for (amax, scale) in [(7.0, 32.0), (0.5, 448.0), (f32::INFINITY, 1.0), (56.0, 4.0)] {
        let x = Tensor::from_slice(&context, [2, 2], &[0.25, amax, 0.0, 0.0]).unwrap();
        let narrow = scaler.quantize("x", &x.transpose(0, 1).unwrap()).unwrap();
        scaler.update().unwrap();
        assert_eq!(scaler.scale("x").unwrap(), scale);
        assert_eq!(narrow.inverse_scale().item::<f32>().unwrap(), 1.0 / scale);
        assert_eq!(
            codes(&narrow),
            [0.25 * scale, 0.0, (amax * scale).min(448.0), 0.0]
        );
    }
    let x = &scaler.stats().unwrap().tensors[0];
    assert_eq!(
        (x.updates, x.not_finite, x.amax, x.overflowed),
        (4, 1, 56.0, 1)
    );
}

#[test]
fn a_tensor_may_come_in_parts_and_from_several_ranks() {
    let context = context();
    let mut scaler = scaler(&context, Fp8Config::default());
    for part in [[1.0, -2.0], [0.5, 0.25]] {
        scaler.quantize("x", &tensor(&context, &part)).unwrap();
    }
    let running = scaler.history().narrow(1, 0, 1).unwrap();
    assert_eq!(running.to_vec::<f32>().unwrap(), [2.0, 0.0]);
    // Another rank saw 7 in its part.
    running.narrow(0, 0, 1).unwrap().fill(7.0).unwrap();
    scaler.update().unwrap();
    assert_eq!(
        (scaler.scale("x").unwrap(), scaler.scale("grad").unwrap()),
        (64.0, 1.0)
    );
}

/// A few iterations, of which one has an infinity; what came out of the last, and the state after it.
fn iterate(scaler: &mut Fp8Scaler, x: &Tensor, amaxes: &[f32]) -> (Vec<f32>, Fp8State) {
    let mut last = Vec::new();
    for amax in amaxes {
        x.narrow(0, 1, 1).unwrap().fill(f64::from(*amax)).unwrap();
        let narrow = scaler.quantize("x", x).unwrap();
        scaler.update().unwrap();
        last = narrow.dequantize(DType::F32).unwrap().to_vec().unwrap();
    }
    (last, scaler.state_dict().unwrap())
}

const AMAXES: [f32; 6] = [1.0, 8.0, f32::INFINITY, 3.0, 0.0, 5.0];

fn short() -> Fp8Config {
    Fp8Config {
        history_length: 3,
        ..Fp8Config::default()
    }
}

#[test]
fn a_saved_state_goes_on_to_the_bit() {
    let context = context();
    let x = tensor(&context, &[0.3, 0.0, -0.7]);
    let whole = iterate(&mut scaler(&context, short()), &x, &AMAXES);
    let (_, saved) = iterate(&mut scaler(&context, short()), &x, &AMAXES[..3]);
    let text = serde_json::to_string(&saved).unwrap();
    let read: Fp8State = serde_json::from_str(&text).unwrap();
    assert_eq!(read, saved);
    // The tensors may stand in another order, and what came before is forgotten.
    let turned = [TENSORS[1], TENSORS[0]];
    let mut second = Fp8Scaler::new(&context, short(), &turned).unwrap();
    second.quantize("grad", &x).unwrap();
    assert!(matches!(second.state_dict(), Err(Error::Scaler(_))));
    second.load_state_dict(&read).unwrap();
    let (last, state) = iterate(&mut second, &x, &AMAXES[3..]);
    assert_eq!((&last, &state.tensors[1]), (&whole.0, &whole.1.tensors[0]));
    assert_eq!(state.tensors[0], whole.1.tensors[1]);
}

#[test]
fn states_that_cannot_be_are_refused_by_key() {
    let context = context();
    let mut scaler = scaler(&context, short());
    let x = tensor(&context, &[0.3, 0.0, -0.7]);
    let (_, good) = iterate(&mut scaler, &x, &[4.0, 2.0]);
    type Change = fn(&mut Fp8State);
    let cases: [(&str, &str, Change); 10] = [
        ("version", "3 is not known", |state| state.version = 3),
        ("tensors", "`grad` is missing", |state| {
            drop(state.tensors.pop())
        }),
        ("tensors", "`y` is not one of", |state| {
            state.tensors[0].name = "y".to_owned()
        }),
        ("tensors", "`grad` appears twice", |state| {
            state.tensors[0].name = "grad".to_owned()
        }),
        ("dtype", "as f8e5m2, but is f8e4m3", |state| {
            state.tensors[0].dtype = DType::F8E5M2;
        }),
        ("scale", "0e0, of `x`", |state| state.tensors[0].scale = 0.0),
        ("scale", "NaN, of `grad`", |state| {
            state.tensors[1].scale = f32::NAN
        }),
        ("history", "`x` has 4", |state| {
            state.tensors[0].history.push(1.0)
        }),
        ("history", "-1e0, of `x`", |state| {
            state.tensors[0].history[2] = -1.0
        }),
        ("history", "`x` begins with 1e0", |state| {
            state.tensors[0].history[0] = 1.0
        }),
    ];
    for (wanted, told, change) in cases {
        let mut bad = good.clone();
        change(&mut bad);
        match scaler.load_state_dict(&bad).unwrap_err() {
            Error::InvalidState { key, reason } => {
                assert_eq!(key, wanted);
                assert!(reason.contains(told), "{reason}");
            }
            other => panic!("{other}"),
        }
        assert_eq!(scaler.state_dict().unwrap(), good, "nothing was changed");
    }
    let read = |text| {
        serde_json::from_str::<Fp8State>(text)
            .unwrap_err()
            .to_string()
    };
    assert!(read(r#"{"version": 1, "tensors": [], "more": 1}"#).contains("unknown field `more`"));
    assert!(read(r#"{"tensors": []}"#).contains("missing field `version`"));
    // A later version is named before its keys are complained about.
    assert!(read(r#"{"version": 3, "tensors": 3, "more": 1}"#).contains("version 3 is not known"));
}

#[test]
fn a_state_of_another_recipe_is_not_taken_for_this_one() {
    let context = context();
    let x = tensor(&context, &[0.3, 0.0, -0.7]);
    let of = |config: Fp8Config| iterate(&mut scaler(&context, config), &x, &AMAXES[..2]).1;
    let single = |scaling| Fp8Config {
        scaling,
        history_length: 1,
        ..Fp8Config::default()
    };
    let recent = Fp8Config {
        algorithm: AmaxAlgorithm::MostRecent,
        ..short()
    };
    for (saved, here, key, told) in [
        (
            single(Fp8Scaling::Current),
            single(Fp8Scaling::Delayed),
            "recipe/scaling",
            "saved with Current, but the scaler uses Delayed",
        ),
        (
            single(Fp8Scaling::Delayed),
            single(Fp8Scaling::Current),
            "recipe/scaling",
            "saved with Delayed, but the scaler uses Current",
        ),
        (
            short(),
            recent,
            "recipe/algorithm",
            "saved with Max, but the scaler uses MostRecent",
        ),
    ] {
        let mut scaler = scaler(&context, here);
        let before = scaler.state_dict().unwrap();
        match scaler.load_state_dict(&of(saved)) {
            Err(Error::InvalidState { key: named, reason }) => {
                assert_eq!((named.as_str(), reason.as_str()), (key, told));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(scaler.state_dict().unwrap(), before);
    }
}

#[test]
fn the_numbers_of_a_recipe_come_along() {
    let context = context();
    let x = tensor(&context, &[0.3, 0.0, -0.7]);
    let of = |config: Fp8Config| iterate(&mut scaler(&context, config), &x, &AMAXES[..2]).1;
    // They decide the next scale: 448 / 8 / 4, rounded down to 8.
    let numbers = Fp8Config {
        margin: 2,
        power_of_two: true,
        ..short()
    };
    let state = of(numbers.clone());
    let mut into = scaler(&context, short());
    into.load_state_dict(&state).unwrap();
    assert_eq!(into.config(), &numbers);
    let (_, after) = iterate(&mut into, &x, &[1.0]);
    assert_eq!(after.tensors[0].scale, 8.0);
    // A state of version 1 has none, and says so.
    let old = Fp8State {
        version: 1,
        recipe: None,
        ..state.clone()
    };
    assert_eq!((old.lacks(), state.lacks()), (vec!["recipe"], vec![]));
    let text = serde_json::to_string(&old).unwrap();
    assert!(!text.contains("recipe"), "{text}");
    let mut into = scaler(&context, short());
    into.load_state_dict(&serde_json::from_str(&text).unwrap())
        .unwrap();
    assert_eq!((into.config(), into.scale("x").unwrap()), (&short(), 8.0));
    let mut bad = state;
    bad.recipe.as_mut().unwrap().margin = 65;
    match into.load_state_dict(&bad) {
        Err(Error::InvalidState { key, .. }) => assert_eq!(key, "recipe/margin"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn replays_of_a_graph_scale_as_calls_do() {
    for config in [short(), Fp8Config::current()] {
        let run = |captured: bool| {
            let context = context();
            let mut scaler = scaler(&context, config.clone());
            let x = tensor(&context, &[0.3, 1.0, -0.7]);
            let mut kept = Vec::new();
            let mut step = || -> kitsune::Result<()> {
                let narrow = scaler.quantize("x", &x)?;
                scaler.update()?;
                kept.push((narrow.dequantize(DType::F32)?, narrow));
                Ok(())
            };
            // The first step makes all memory.
            step().unwrap();
            let graph = captured.then(|| context.stream().capture(&mut step).unwrap());
            let slot = x.narrow(0, 1, 1).unwrap();
            for amax in AMAXES {
                slot.fill(f64::from(amax)).unwrap();
                match &graph {
                    // SAFETY: the graph touches the scaler, `x` and what was kept, all of which are alive.
                    Some(graph) => unsafe { graph.launch(context.stream()) }.unwrap(),
                    None => step().unwrap(),
                }
            }
            let last = kept.last().unwrap().0.to_vec::<f32>().unwrap();
            (last, scaler.state_dict().unwrap(), scaler.stats().unwrap())
        };
        assert_eq!(run(true), run(false), "{config:?}");
    }
}

#[test]
fn nothing_waits_and_memory_is_used_again() {
    for config in [short(), Fp8Config::current()] {
        let faults = Arc::new(FaultDriver::new(device().driver().clone()));
        let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
        let mut scaler = scaler(&context, config);
        let x = Tensor::full(&context, [4096], DType::F16, 0.5).unwrap();
        let mut step = || {
            let narrow = scaler.quantize("x", &x).unwrap();
            drop(narrow.dequantize(DType::F16).unwrap());
            scaler.update().unwrap();
        };
        step();
        context.synchronize().unwrap();
        let before = context.pool().stats().num_device_alloc;
        faults.reset_calls();
        (0..10).for_each(|_| step());
        for call in ["synchronize_stream", "synchronize_event", "copy_to_host"] {
            assert_eq!(faults.calls(call), 0, "{call}");
        }
        assert!(faults.calls("launch") >= 30);
        assert_eq!(context.pool().stats().num_device_alloc, before);
    }
}

const CLASSES: usize = 4;
const PIXELS: usize = 16;
const ROWS: usize = 64;
const STEPS: usize = 60;

fn random(context: &Context, seed: u64, shape: [usize; 2], range: f32) -> Tensor {
    let mut random = fastrand::Rng::with_seed(seed);
    let values: Vec<f32> = (0..shape[0] * shape[1])
        .map(|_| (random.f32() * 2.0 - 1.0) * range)
        .collect();
    Tensor::from_slice(context, shape, &values).unwrap()
}

/// Losses of a network whose products take operands that went through 8 bits, weights in e4m3 and gradients in e5m2
/// among them; or through bf16 alone. Products are in bf16 either way.
fn train(context: &Context, config: Option<Fp8Config>) -> kitsune::Result<Vec<f32>> {
    let tensors = [
        ("input", DType::F8E4M3),
        ("hidden", DType::F8E4M3),
        ("active", DType::F8E4M3),
        ("output", DType::F8E4M3),
        ("grad above", DType::F8E5M2),
        ("grad below", DType::F8E5M2),
    ];
    let mut scaler = match config {
        Some(config) => Some(Fp8Scaler::new(context, config, &tensors)?),
        None => None,
    };
    let hidden = Parameter::new("hidden", random(context, 1, [32, PIXELS], 0.4))?;
    let output = Parameter::new("output", random(context, 2, [CLASSES, 32], 0.3))?;
    let mut optimizer = AdamW::new(vec![hidden.clone(), output.clone()], AdamWConfig::default())?;
    optimizer.set_learning_rate(0.01)?;
    // Each row is that of its class, and noise.
    let centers = random(context, 3, [CLASSES, PIXELS], 1.0);
    let labels: Vec<u32> = (0..4).cycle().take(ROWS).collect();
    let labels = Tensor::from_slice(context, [ROWS], &labels)?;
    let noise = random(context, 4, [ROWS, PIXELS], 1.0);
    let input = ops::add(&ops::embedding(&centers, &labels)?, &noise)?;
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let narrow = |name: &str, x: &Tensor| match &scaler {
            Some(scaler) => scaler.quantize(name, x)?.dequantize(DType::Bf16),
            None => x.cast(DType::Bf16),
        };
        let weight = narrow("hidden", hidden.value())?;
        let below = ops::linear(&narrow("input", &input)?, &weight, None)?;
        let active = narrow("active", &ops::relu(below.output())?)?;
        let weight = narrow("output", output.value())?;
        let above = ops::linear(&active, &weight, None)?;
        let loss = ops::softmax_cross_entropy(above.output(), &labels)?;
        let above = above.backward(&narrow("grad above", &loss.backward()?)?)?;
        let inner = ops::relu_backward(below.output(), &above.input)?;
        let below = below.backward(&narrow("grad below", &inner)?)?;
        output.set_grad(above.weight)?;
        hidden.set_grad(below.weight)?;
        optimizer.step_unscaled()?;
        optimizer.zero_grad();
        if let Some(scaler) = &mut scaler {
            scaler.update()?;
        }
        losses.push(loss.value().item()?);
    }
    Ok(losses)
}

#[test]
fn a_training_through_8_bits_follows_the_one_in_bf16() {
    let context = context();
    let wide = train(&context, None).unwrap();
    let floored = Fp8Config {
        power_of_two: true,
        ..Fp8Config::current()
    };
    for config in [Fp8Config::default(), Fp8Config::current(), floored] {
        let narrow = train(&context, Some(config.clone())).unwrap();
        assert!(
            narrow[STEPS - 1] < 0.05 * narrow[0],
            "it learns: {narrow:?}"
        );
        for (step, (wide, narrow)) in wide.iter().zip(&narrow).enumerate() {
            let far = (wide - narrow).abs();
            assert!(
                far < 0.1 * wide,
                "{config:?}, step {step}: {narrow}, not {wide}"
            );
        }
    }
}

#[test]
fn misuse_is_told_by_name() {
    let context = context();
    let refused = |config, tensors: &[(&str, DType)]| {
        Fp8Scaler::new(&context, config, tensors)
            .unwrap_err()
            .to_string()
    };
    let twice = [("x", DType::F8E4M3), ("x", DType::F8E5M2)];
    let base = Fp8Config::default;
    assert_eq!(
        refused(base(), &twice),
        "Fp8Scaler::new: two tensors named `x`"
    );
    assert_eq!(refused(base(), &[]), "Fp8Scaler::new: no tensors");
    let wide = [("x", DType::F16)];
    assert_eq!(
        refused(base(), &wide),
        "Fp8Scaler::new does not support f16"
    );
    let margin = Fp8Config {
        margin: 100,
        ..base()
    };
    assert!(refused(margin, &TENSORS).contains("margin: 100 is not from 0 to 64"));

    let scaler = scaler(&context, base());
    let refused = |name: &str, x: &Tensor| scaler.quantize(name, x).unwrap_err().to_string();
    let x = tensor(&context, &[1.0]);
    assert_eq!(
        refused("y", &x),
        "quantize: no tensor `y`; known are x, grad"
    );
    let labels = Tensor::zeros(&context, [1], DType::U32).unwrap();
    assert_eq!(refused("x", &labels), "quantize does not support u32");
    let narrow = x.cast(DType::F8E5M2).unwrap();
    assert_eq!(refused("x", &narrow), "quantize does not support f8e5m2");
    let elsewhere = Context::with_pool(context.pool()).unwrap();
    let told = refused("x", &tensor(&elsewhere, &[1.0]));
    assert!(told.contains("`x` is on another stream"), "{told}");
    let quantized = scaler.quantize("x", &x).unwrap();
    let told = quantized.dequantize(DType::F8E4M3).unwrap_err().to_string();
    assert_eq!(told, "dequantize does not support f8e4m3");
}
