//! Runs steps of a scaler and of Adam or AdamW that a file describes, and prints what each left: the side of this crate
//! in the comparison that `tests/peers/differential.py` makes with PyTorch.
//!
//! Reads JSON lines from the standard input, a case each, and writes a line for each. Numbers are their bits,
//! as integers: JSON's decimals may lose the last one on the way.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a case that cannot run ends the comparison"
)]

use std::io::{BufRead, stdin};

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{AdamFamily, AdamFamilyConfig, Optimizer, Parameter};
use kitsune::{Context, DType, Device, HostConfig, Result, Tensor, bf16, f16};
use serde_json::{Value, json};

/// A tensor with these bits.
fn tensor(context: &Context, dtype: DType, bits: &Value) -> Result<Tensor> {
    let bits = bits.as_array().unwrap().iter().map(|n| n.as_u64().unwrap());
    let len = [bits.len()];
    let narrow = bits.clone().map(|n| u32::try_from(n).unwrap_or(0));
    let half = bits.clone().map(|n| u16::try_from(n).unwrap_or(0));
    match dtype {
        DType::F64 => {
            Tensor::from_slice(context, len, &bits.map(f64::from_bits).collect::<Vec<_>>())
        }
        DType::F16 => {
            Tensor::from_slice(context, len, &half.map(f16::from_bits).collect::<Vec<_>>())
        }
        DType::Bf16 => {
            Tensor::from_slice(context, len, &half.map(bf16::from_bits).collect::<Vec<_>>())
        }
        _ => Tensor::from_slice(
            context,
            len,
            &narrow.map(f32::from_bits).collect::<Vec<_>>(),
        ),
    }
}

/// The bits of a tensor.
fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    Ok(match tensor.dtype() {
        DType::F64 => tensor
            .to_vec::<f64>()?
            .iter()
            .map(|x| x.to_bits())
            .collect(),
        DType::F16 => tensor
            .to_vec::<f16>()?
            .iter()
            .map(|x| x.to_bits().into())
            .collect(),
        DType::Bf16 => tensor
            .to_vec::<bf16>()?
            .iter()
            .map(|x| x.to_bits().into())
            .collect(),
        DType::U32 => tensor
            .to_vec::<u32>()?
            .iter()
            .map(|x| u64::from(*x))
            .collect(),
        _ => tensor
            .to_vec::<f32>()?
            .iter()
            .map(|x| x.to_bits().into())
            .collect(),
    })
}

/// All steps of one case, and what each left.
fn run<const DECOUPLED: bool>(context: &Context, case: &Value) -> Result<Vec<Value>> {
    let dtype = |key: &str| case[key].as_str().unwrap().parse::<DType>();
    let (weight_dtype, grad_dtype) = (dtype("weight_dtype")?, dtype("grad_dtype")?);
    let weights = case["weights"].as_array().unwrap().iter().enumerate();
    let parameters: Vec<Parameter> = weights
        .map(|(index, bits)| {
            Parameter::new(index.to_string(), tensor(context, weight_dtype, bits)?)
        })
        .collect::<Result<_>>()?;
    let setting = |part: &str, key: &str| f64::from_bits(case[part][key].as_u64().unwrap());
    let config = AdamFamilyConfig::<DECOUPLED> {
        learning_rate: setting("adam", "learning_rate"),
        betas: (setting("adam", "beta1"), setting("adam", "beta2")),
        epsilon: setting("adam", "epsilon"),
        weight_decay: setting("adam", "weight_decay"),
        amsgrad: case["amsgrad"].as_bool().unwrap(),
        ..AdamFamilyConfig::default()
    };
    let mut optimizer = AdamFamily::new(parameters.clone(), config)?;
    let config = AmpConfig {
        init_scale: setting("scaler", "init_scale"),
        growth_factor: setting("scaler", "growth_factor"),
        backoff_factor: setting("scaler", "backoff_factor"),
        growth_interval: u32::try_from(case["growth_interval"].as_u64().unwrap()).unwrap(),
        ..AmpConfig::default()
    };
    let mut scaler = GradScaler::new(context, config)?;
    scaler.scale(&Tensor::full(context, [], DType::F32, 1.0)?)?;

    let mut left = Vec::new();
    for gradients in case["steps"].as_array().unwrap() {
        for (parameter, bits) in parameters.iter().zip(gradients.as_array().unwrap()) {
            parameter.set_grad(tensor(context, grad_dtype, bits)?)?;
        }
        if case["in_place"].as_bool().unwrap() {
            scaler.unscale(&optimizer)?;
        }
        let norm = match case["max_norm"].as_u64().map(f64::from_bits) {
            Some(max_norm) => Some(scaler.clip_grad_norm(&optimizer, max_norm)?.item::<f64>()?),
            None => None,
        };
        let _ = scaler.step(&mut optimizer)?;
        let found_inf = scaler.found_inf(&optimizer).unwrap().item::<f32>()?;
        scaler.update()?;
        let each = |get: &dyn Fn(usize) -> Result<Vec<u64>>| {
            (0..parameters.len()).map(get).collect::<Result<Vec<_>>>()
        };
        left.push(json!({
            "weights": each(&|i| bits(parameters[i].value()))?,
            "gradients": each(&|i| bits(&parameters[i].grad().unwrap()))?,
            "first": each(&|i| bits(optimizer.first_moment(i).unwrap()))?,
            "second": each(&|i| bits(optimizer.second_moment(i).unwrap()))?,
            "largest": each(&|i| optimizer.largest_second_moment(i).map_or(Ok(vec![]), bits))?,
            "steps": bits(optimizer.step_counts())?,
            "norm": norm.map(f64::to_bits),
            "found_inf": found_inf != 0.0,
            "scale": scaler.scale_factor()?,
            "tracker": scaler.stats()?.growth_tracker,
        }));
        optimizer.zero_grad();
    }
    Ok(left)
}

fn main() -> Result<()> {
    let context = Context::new(&Device::host(HostConfig::default())?)?;
    for line in stdin().lock().lines() {
        let case: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let left = match case["decoupled"].as_bool().unwrap() {
            true => run::<true>(&context, &case)?,
            false => run::<false>(&context, &case)?,
        };
        println!("{}", Value::from(left));
    }
    Ok(())
}
