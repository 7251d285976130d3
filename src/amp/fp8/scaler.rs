//! The scaler of 8-bit tensors.

use std::collections::HashMap;
#[cfg(feature = "metrics")]
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Fp8Config, Fp8Scaling, Fp8State, Fp8Stats, Fp8TensorStats, Quantized};
use crate::dtype::DType;
use crate::error::{Error, NAMES_TOLD, Result, ScalerMisuse, listed};
use crate::launch::fp8_update::{Fp8Operands, fp8_update};
use crate::launch::quantize::FP8_COUNTS;
use crate::launch::{self, QuantizeTo};
use crate::memory;
use crate::optim::first_repeated;
use crate::storage::{Context, HostTensor, Load, Tensor};

/// Keeps a scale for each of its tensors and converts them to 8 bits with it. The [module](super) describes how
/// scales are derived.
///
/// One scaler serves one stream. Only calls that say so wait for the device.
///
/// ```
/// use kitsune::amp::fp8::{Fp8Config, Fp8Scaler};
/// use kitsune::{Context, DType, Device, Tensor};
///
/// # fn main() -> kitsune::Result<()> {
/// let context = Context::new(&Device::auto()?)?;
/// let tensors = [("x", DType::F8E4M3), ("grad", DType::F8E5M2)];
/// let mut scaler = Fp8Scaler::new(&context, Fp8Config::default(), &tensors)?;
/// let x = Tensor::from_slice(&context, [2], &[0.5f32, -0.007])?;
/// for _ in 0..2 {
///     let narrow = scaler.quantize("x", &x)?;
///     // A matrix product takes the values and their inverse scale, or the restored elements:
///     let wide = narrow.dequantize(DType::Bf16)?;
///     scaler.update()?;
/// }
/// // 448 / 0.5, since the first update.
/// assert_eq!(scaler.scale("x")?, 896.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Fp8Scaler {
    config: Fp8Config,
    tensors: Vec<(String, DType)>,
    /// The index of each name in `tensors`.
    places: HashMap<String, usize>,
    /// f32, one per tensor.
    scales: Tensor,
    /// f32, one per tensor: the largest number of its type.
    largest: Tensor,
    /// f32, a row per tensor; the first element is the largest magnitude of the current iteration.
    history: Tensor,
    /// f64, a row per tensor.
    counts: Tensor,
    /// Whether something was converted since the last update. Atomic so that `quantize` needs no exclusive access; it
    /// publishes nothing.
    is_due: AtomicBool,
    /// Lives exactly as long as the scaler: there is no other strong reference.
    #[cfg(feature = "metrics")]
    alive: Arc<()>,
}

impl Fp8Scaler {
    /// A scaler for `tensors`, given as unique names and 8-bit types: usually e4m3 for weights and activations, e5m2
    /// for gradients. Scales start at 1.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::InvalidArgument`] for no tensors, or a name that appears twice;
    /// [`Error::UnsupportedDtype`] for a type of more than 8 bits; [`Error::OutOfMemory`].
    pub fn new(context: &Context, config: Fp8Config, tensors: &[(&str, DType)]) -> Result<Self> {
        const OP: &str = "Fp8Scaler::new";
        config.validate()?;
        if tensors.is_empty() {
            return Err(Error::argument(OP, "no tensors"));
        }
        if let Some((_, dtype)) = tensors.iter().find(|(_, dtype)| !dtype.is_f8()) {
            return Err(Error::UnsupportedDtype {
                op: OP,
                dtype: *dtype,
            });
        }
        if let Some((_, twice)) = first_repeated(tensors.iter().map(|(name, _)| name)) {
            let name = tensors[twice].0;
            return Err(Error::argument(OP, format!("two tensors named `{name}`")));
        }
        let places = tensors.iter().enumerate();
        let places = places.map(|(place, (name, _))| ((*name).to_owned(), place));
        let _tag = memory::tag("amp");
        let number = tensors.len();
        let scaler = Self {
            scales: Tensor::full(context, [number], DType::F32, 1.0)?,
            largest: Tensor::uninit(context, [number], DType::F32)?,
            history: Tensor::zeros(context, [number, config.places()], DType::F32)?,
            counts: Tensor::zeros(context, [number, FP8_COUNTS], DType::F64)?,
            tensors: tensors
                .iter()
                .map(|(name, dtype)| ((*name).to_owned(), *dtype))
                .collect(),
            places: places.collect(),
            is_due: AtomicBool::new(false),
            #[cfg(feature = "metrics")]
            alive: Arc::new(()),
            config,
        };
        for (place, (_, dtype)) in tensors.iter().enumerate() {
            scaler.largest.narrow(0, place, 1)?.fill(dtype.largest())?;
        }
        Ok(scaler)
    }

    /// `x` times the tensor's scale, rounded to its 8-bit type. A tensor may be converted in parts, one call each:
    /// its largest magnitude covers all parts since the last [`update`](Self::update).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a name that was not given to [`new`](Self::new), or another stream than the
    /// scaler's; [`Error::UnsupportedDtype`] unless `x` is a float of 16 bits or more; [`Error::OutOfMemory`].
    pub fn quantize(&self, name: &str, x: &Tensor) -> Result<Quantized> {
        const OP: &str = "quantize";
        let place = self.place(OP, name)?;
        if !x.dtype().is_computed() {
            return Err(Error::UnsupportedDtype {
                op: OP,
                dtype: x.dtype(),
            });
        }
        let stream = self.scales.context().stream();
        if x.context().stream().id() != stream.id() {
            let reason = format!("`{name}` is on another stream; copy_to the scaler's first");
            return Err(Error::argument(OP, reason));
        }
        let dense = x.contiguous()?;
        let values = Tensor::uninit(x.context(), x.shape(), self.tensors[place].1)?;
        let inverse = Tensor::uninit(x.context(), [], DType::F32)?;
        let row = self.row(place)?;
        let running = row.history.sub(0, 1);
        let is_delayed = self.config.scaling == Fp8Scaling::Delayed;
        if !is_delayed {
            launch::amax(stream, &dense.span()?, &running)?;
            fp8_update(stream, &row, &self.config.policy())?;
        }
        let to = QuantizeTo {
            y: &values.span()?,
            scale: &row.scales,
            overflow: self.config.overflow,
            inverse: Some(&inverse.span()?),
            amax: is_delayed.then_some(&running),
            counts: Some(&row.counts),
        };
        launch::quantize(stream, &dense.span()?, &to)?;
        // Relaxed: see the field.
        self.is_due.store(is_delayed, Ordering::Relaxed);
        Ok(Quantized { values, inverse })
    }

    /// Updates all scales from the conversions since the last update, and rolls the histories. Tensors that were not
    /// converted, held only zeros, or held an infinity or NaN keep scale and history. Does nothing for current
    /// scaling.
    ///
    /// # Errors
    /// [`Error::Driver`] if the update cannot be enqueued.
    pub fn update(&mut self) -> Result<()> {
        if self.config.scaling == Fp8Scaling::Current {
            return Ok(());
        }
        let operands = Fp8Operands {
            scales: self.scales.span()?,
            largest: self.largest.span()?,
            history: self.history.span()?,
            counts: self.counts.span()?,
            length: self.config.places(),
        };
        fp8_update(
            self.scales.context().stream(),
            &operands,
            &self.config.policy(),
        )?;
        // Relaxed: see the field.
        self.is_due.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The tensor's scale. Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown name; [`Error::Driver`] if work of the stream failed.
    pub fn scale(&self, name: &str) -> Result<f32> {
        let place = self.place("scale", name)?;
        self.scales.narrow(0, place, 1)?.item()
    }

    /// The histories, f32 of `[tensors, length]`, in the order given to [`new`](Self::new). The first column holds
    /// the largest magnitudes of the current iteration. Where several ranks hold parts of the tensors, combine that
    /// column across them with a maximum before [`update`](Self::update). With current scaling the only column is
    /// meaningless between calls.
    #[must_use]
    pub fn history(&self) -> &Tensor {
        &self.history
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &Fp8Config {
        &self.config
    }

    /// Names and types of the tensors.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, DType)> {
        self.tensors
            .iter()
            .map(|(name, dtype)| (name.as_str(), *dtype))
    }

    /// Statistics so far. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed.
    pub fn stats(&self) -> Result<Fp8Stats> {
        let (scales, counts) = (self.scales.to_vec()?, self.counts.to_vec::<f64>()?);
        let rows = scales.iter().zip(counts.chunks_exact(FP8_COUNTS));
        let tensors = self.tensors.iter().zip(rows);
        Ok(Fp8Stats {
            tensors: tensors
                .map(|((name, dtype), (scale, counts))| {
                    Fp8TensorStats::read(name, *dtype, *scale, counts)
                })
                .collect(),
        })
    }

    /// The state needed to resume later. Waits for the device.
    ///
    /// # Errors
    /// [`ScalerMisuse::MidIteration`] if something was converted since the last update; [`Error::Driver`] if work of
    /// the stream failed.
    pub fn state_dict(&self) -> Result<Fp8State> {
        // Relaxed: see the field.
        if self.is_due.load(Ordering::Relaxed) {
            return Err(ScalerMisuse::MidIteration.into());
        }
        Ok(Fp8State::new(
            &self.config,
            &self.tensors,
            &self.scales.to_vec()?,
            &self.history.to_vec()?,
        ))
    }

    /// Resumes from a saved state: scales, histories, `margin`, `power_of_two` and `epsilon` become those of `state`.
    /// Conversions since the last update are forgotten. Counters and [`Fp8Config::overflow`] are left unchanged, and
    /// so are all settings if `state` is of version 1, which has none ([`Fp8State::lacks`]).
    ///
    /// # Errors
    /// [`Error::InvalidState`] if `state` has other tensors, another history length, another `scaling` or
    /// `algorithm`, or invalid numbers; [`Error::Driver`] if the driver refuses. Nothing was changed.
    pub fn load_state_dict(&mut self, state: &Fp8State) -> Result<()> {
        self.load(state)?.carry_out()
    }

    /// [`load_state_dict`](Self::load_state_dict), checked but not carried out yet.
    pub(crate) fn load(&mut self, state: &Fp8State) -> Result<Load<'_>> {
        let config = state.config(&self.config)?;
        let (scales, history) = state.unpack(&self.tensors, self.config.places())?;
        let writes = [(&self.scales, scales), (&self.history, history)];
        let writes = writes.into_iter().map(|(tensor, values)| {
            let values = HostTensor::from_slice(tensor.shape(), &values)?;
            Ok((tensor.clone(), values))
        });
        let load = Load::writing(writes.collect::<Result<_>>()?);
        // Relaxed: see the field.
        Ok(load.then(move || {
            self.is_due.store(false, Ordering::Relaxed);
            self.config = config;
        }))
    }

    /// Identifies this scaler uniquely, and reveals whether it was dropped.
    #[cfg(feature = "metrics")]
    pub(crate) fn token(&self) -> std::sync::Weak<dyn std::any::Any + Send + Sync> {
        let alive: std::sync::Weak<()> = Arc::downgrade(&self.alive);
        alive
    }

    fn place(&self, op: &'static str, name: &str) -> Result<usize> {
        self.places.get(name).copied().ok_or_else(|| {
            let known = self.tensors.iter().map(|(name, _)| name);
            let known = listed(known, NAMES_TOLD);
            let reason = format!("no tensor `{name}`; known are {known}");
            Error::argument(op, reason)
        })
    }

    /// The memory of one tensor.
    fn row(&self, place: usize) -> Result<Fp8Operands> {
        let length = self.config.places();
        Ok(Fp8Operands {
            scales: self.scales.span()?.sub(place, 1),
            largest: self.largest.span()?.sub(place, 1),
            history: self.history.span()?.sub(place * length, length),
            counts: self.counts.span()?.sub(place * FP8_COUNTS, FP8_COUNTS),
            length,
        })
    }
}
