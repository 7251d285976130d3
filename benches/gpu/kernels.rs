//! Kernels over 10⁸ elements: bytes that they must move, over the time that they take.
//!
//! Bytes count each operand once: what a gradient check reads, what an optimizer reads and writes. The few small
//! kernels that belong to a call (the clip coefficient, step counts) are in its time.

use kitsune::amp::fp8::{Fp8Config, Fp8Scaler};
use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{
    AdamW, AdamWConfig, MasterWeights, Moments, Optimizer, Parameter, Sgd, SgdConfig,
};
use kitsune::{Context, DType, Result, Tensor, ops};
use serde_json::json;

use crate::clock::{Laps, device_time, median, repeat};
use crate::setting::Setting;

/// Elements; on a simulated device more than one chunk.
const ELEMENTS: usize = 100_000_000;
const ELEMENTS_SMALL: usize = 70_000;
/// The width of the square matrices.
const WIDTH: usize = 4096;
const WIDTH_SMALL: usize = 48;

pub(crate) fn run(setting: &Setting) -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        checks(setting, dtype)?;
        unscaling(setting, dtype)?;
        optimizers(setting, dtype)?;
    }
    casts(setting)?;
    scaled_casts(setting)?;
    products(setting)
}

fn elements(setting: &Setting) -> usize {
    setting.size(ELEMENTS, ELEMENTS_SMALL)
}

/// One parameter of ones with small gradients.
fn parameter(setting: &Setting, context: &Context, dtype: DType) -> Result<Parameter> {
    let shape = [elements(setting)];
    let parameter = Parameter::new("w", Tensor::full(context, shape, dtype, 1.0)?)?;
    parameter.set_grad(Tensor::full(context, shape, dtype, 1e-3)?)?;
    Ok(parameter)
}

/// A scaler that changes no gradient.
fn scaler(context: &Context) -> Result<GradScaler> {
    let config = AmpConfig {
        init_scale: 1.0,
        growth_interval: i32::MAX.unsigned_abs(),
        ..AmpConfig::default()
    };
    let scaler = GradScaler::new(context, config)?;
    scaler.scale(&Tensor::full(context, [], DType::F32, 1.0)?)?;
    Ok(scaler)
}

fn bytes_of(dtype: DType) -> u64 {
    dtype.bits() / 8
}

fn checks(setting: &Setting, dtype: DType) -> Result<()> {
    let context = setting.context()?;
    let parameter = parameter(setting, &context, dtype)?;
    let optimizer = Sgd::new(vec![parameter], SgdConfig::default())?;
    let mut scaler = scaler(&context)?;
    let time = device_time(setting, context.stream(), || {
        scaler.clip_grad_norm(&optimizer, 1.0).map(drop)
    })?;
    tell(
        setting,
        &format!("check_norm/{dtype}"),
        bytes_of(dtype),
        time,
    );
    Ok(())
}

/// Unscaling in place, which is allowed once between two updates.
fn unscaling(setting: &Setting, dtype: DType) -> Result<()> {
    let context = setting.context()?;
    let parameter = parameter(setting, &context, dtype)?;
    let optimizer = Sgd::new(vec![parameter], SgdConfig::default())?;
    let mut scaler = scaler(&context)?;
    let laps = Laps::new(setting, context.stream(), 1)?;
    let times = repeat(|| {
        laps.runway(1)?;
        laps.mark(0)?;
        scaler.unscale(&optimizer)?;
        laps.mark(1)?;
        scaler.update()?;
        context.synchronize()?;
        laps.lap(0)
    })?;
    tell(
        setting,
        &format!("unscale/{dtype}"),
        2 * bytes_of(dtype),
        median(times),
    );
    Ok(())
}

fn optimizers(setting: &Setting, dtype: DType) -> Result<()> {
    let width = bytes_of(dtype);
    // A 16-bit weight is written, its master weight of 4 bytes is read and written.
    let weight = if dtype.is_half() {
        width + 8
    } else {
        2 * width
    };
    for momentum in [0.0, 0.9] {
        let context = setting.context()?;
        let parameters = vec![parameter(setting, &context, dtype)?];
        let config = SgdConfig {
            learning_rate: 1e-6,
            momentum,
            ..SgdConfig::default()
        };
        let optimizer = Sgd::new(parameters, config)?;
        let (name, state) = if momentum > 0.0 {
            ("sgd_momentum", 8)
        } else {
            ("sgd", 0)
        };
        step(
            setting,
            &format!("{name}/{dtype}"),
            weight + width + state,
            &context,
            optimizer,
        )?;
    }
    // Both moments are read and written. A master cut in two is read and written with its parameter, 2 bytes each.
    let all = [
        ("adamw", MasterWeights::F32, Moments::Full, weight + 16),
        ("adamw_split", MasterWeights::Split, Moments::Full, 8 + 16),
        (
            "adamw_bf16_moments",
            MasterWeights::F32,
            Moments::Bf16,
            weight + 8,
        ),
    ];
    for (name, master_weights, moments, bytes) in all {
        let is_split = master_weights == MasterWeights::Split;
        if is_split && dtype != DType::Bf16 || moments == Moments::Bf16 && dtype == DType::F64 {
            continue;
        }
        let context = setting.context()?;
        let parameters = vec![parameter(setting, &context, dtype)?];
        let config = AdamWConfig {
            master_weights,
            moments,
            ..AdamWConfig::default()
        };
        let optimizer = AdamW::new(parameters, config)?;
        let name = format!("{name}/{dtype}");
        step(setting, &name, bytes + width, &context, optimizer)?;
    }
    Ok(())
}

fn step(
    setting: &Setting,
    name: &str,
    bytes: u64,
    context: &Context,
    mut optimizer: impl Optimizer,
) -> Result<()> {
    let time = device_time(setting, context.stream(), || optimizer.step_unscaled())?;
    tell(setting, name, bytes, time);
    Ok(())
}

fn casts(setting: &Setting) -> Result<()> {
    for (from, to) in [
        (DType::F32, DType::F16),
        (DType::Bf16, DType::F32),
        (DType::F32, DType::F8E4M3),
        (DType::Bf16, DType::F8E5M2),
    ] {
        let context = setting.context()?;
        let shape = [elements(setting)];
        let source = Tensor::full(&context, shape, from, 1.0)?;
        let time = device_time(setting, context.stream(), || source.cast(to).map(drop))?;
        tell(
            setting,
            &format!("cast/{from}_{to}"),
            bytes_of(from) + bytes_of(to),
            time,
        );
    }
    Ok(())
}

/// To 8 bits with a scale, the largest magnitude and counts beside it, and back.
fn scaled_casts(setting: &Setting) -> Result<()> {
    for (wide, narrow) in [(DType::F32, DType::F8E4M3), (DType::Bf16, DType::F8E5M2)] {
        let context = setting.context()?;
        let source = Tensor::full(&context, [elements(setting)], wide, 1.0)?;
        let scaler = Fp8Scaler::new(&context, Fp8Config::default(), &[("x", narrow)])?;
        let stream = context.stream();
        let time = device_time(setting, stream, || scaler.quantize("x", &source).map(drop))?;
        let bytes = bytes_of(wide) + bytes_of(narrow);
        tell(setting, &format!("quantize/{wide}_{narrow}"), bytes, time);
        let quantized = scaler.quantize("x", &source)?;
        let time = device_time(setting, stream, || quantized.dequantize(wide).map(drop))?;
        tell(setting, &format!("dequantize/{narrow}_{wide}"), bytes, time);
    }
    Ok(())
}

/// Square products: floating-point operations, not bytes.
#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn products(setting: &Setting) -> Result<()> {
    let width = setting.size(WIDTH, WIDTH_SMALL);
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let context = setting.context()?;
        let [a, b] = [1.0, 1e-3].map(|value| Tensor::full(&context, [width, width], dtype, value));
        let (a, b) = (a?, b?);
        let time = device_time(setting, context.stream(), || ops::matmul(&a, &b).map(drop))?;
        let operations = 2.0 * (width as f64).powi(3);
        let name = format!("matmul/{dtype}");
        let rate = operations / time / 1e6;
        setting.tell(
            "kernels",
            &name,
            json!({ "us": time, "width": width, "tflop_per_s": rate }),
        );
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn tell(setting: &Setting, name: &str, bytes_an_element: u64, microseconds: f64) {
    let elements = elements(setting);
    let bytes = elements as u64 * bytes_an_element;
    let rate = bytes as f64 / microseconds / 1e3;
    setting.tell(
        "kernels",
        name,
        json!({ "us": microseconds, "gb_per_s": rate, "bytes": bytes, "elements": elements }),
    );
}
