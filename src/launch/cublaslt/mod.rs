//! Matrix products by cuBLASLt, if it is installed.
//!
//! The library is looked up at the first product on a device. Products that it refuses, or whose operands it cannot
//! read in place, fall back to this crate's kernel, as do all products if the library is missing. Sums are computed in
//! the same type as in the kernel and rounded once: algorithms that add partial sums in the output type are ruled out,
//! and so are reduced-precision products of f32.
//!
//! A *plan* is an algorithm and the workspace it needs, in bytes. It is chosen once for each kind of product and
//! cached, so the same sizes produce the same bits throughout a process. Enqueuing allocates no memory and waits for
//! nothing, so products can be captured.
//!
//! Must not know: where the workspace comes from.

mod layout;
mod library;
mod objects;

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::{null_mut, with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::Arc;

use cudarc::cublaslt::sys::cublasLtMatmulAlgo_t;
use parking_lot::Mutex;

use self::layout::Stored;
use self::library::{Library, SUCCESS};
use self::objects::Objects;
use super::{Accumulate, Matrix, Span};
use crate::driver::cuda::{Entered, enter};
use crate::driver::{DevicePtr, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::units::to_usize;

/// The largest workspace of an algorithm: NVIDIA's recommendation from compute capability 9.0 on, and for older
/// devices.
const WORKSPACE_MAX: [u64; 2] = [32 << 20, 4 << 20];
/// The alignment beyond which the library makes no distinction.
const ALIGNMENT_MAX: u32 = 256;
/// The most plans cached for a device. When it is reached, the cache is cleared.
const PLANS_MAX: usize = 4096;

/// A product as the library sees it, without addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    /// The library's operands: `b`, `a`, and its output.
    matrices: [Stored; 3],
    /// Their alignments in bytes.
    alignments: [u32; 3],
    dtype: DType,
    out_dtype: DType,
    adds: bool,
    workspace_max: u64,
}

/// An algorithm and the workspace it needs.
#[derive(Clone, Copy)]
struct Plan {
    algorithm: cublasLtMatmulAlgo_t,
    workspace: u64,
}

/// The library on one device, with the plans made so far. A plan of `None` is a product that the library refuses.
struct Device {
    library: Library,
    plans: Mutex<HashMap<Kind, Option<Plan>>>,
}

/// A product to enqueue. Its sizes, types and streams have been checked.
pub(super) struct Product<'a> {
    pub(super) a: &'a Matrix,
    pub(super) b: &'a Matrix,
    pub(super) out: &'a Span,
    pub(super) accumulate: Accumulate,
}

/// Why cuBLASLt does not compute products on the CUDA device with this number; `None` if it does.
///
/// # Errors
/// [`Error::Driver`] if the device cannot be opened.
pub fn why_not_cublaslt(ordinal: u32) -> Result<Option<String>> {
    let stream = crate::driver::Device::cuda(ordinal)?.create_stream()?;
    let entered = enter("matmul", &stream)?;
    Ok(entered.and_then(|entered| Device::get(&entered).err()))
}

impl Device {
    /// The library on the entered device, or why it cannot be used. Looked up once per device.
    fn get(entered: &Entered) -> Result<Arc<Self>, String> {
        type Found = Result<Arc<Device>, String>;
        static DEVICES: Mutex<Vec<(u32, Found)>> = Mutex::new(Vec::new());
        let mut devices = DEVICES.lock();
        if let Some((_, found)) = devices.iter().find(|(of, _)| *of == entered.ordinal) {
            return found.clone();
        }
        let found = Library::open().map(|library| {
            Arc::new(Self {
                library,
                plans: Mutex::default(),
            })
        });
        devices.push((entered.ordinal, found.clone()));
        found
    }

    fn plan(&self, kind: &Kind) -> Option<Plan> {
        let mut plans = self.plans.lock();
        if let Some(plan) = plans.get(kind) {
            return *plan;
        }
        if plans.len() >= PLANS_MAX {
            plans.clear();
        }
        let objects = Objects::new(&self.library, kind);
        let plan = objects.and_then(|objects| objects.choose(kind));
        plans.insert(*kind, plan);
        plan
    }
}

impl Product<'_> {
    /// Bytes of workspace that the product needs; 0 if the library does not compute it.
    pub(super) fn workspace(&self, stream: &Stream) -> u64 {
        let entered = enter("matmul", stream).ok().flatten();
        let device = entered.and_then(|entered| Device::get(&entered).ok());
        let plan = device
            .zip(self.kind(stream))
            .and_then(|(device, kind)| device.plan(&kind));
        plan.map_or(0, |plan| plan.workspace)
    }

    /// Enqueues the product. Returns false, with nothing enqueued, if the library does not compute it.
    pub(super) fn enqueue(&self, stream: &Stream, workspace: Option<&Span>) -> Result<bool> {
        const CALL: &str = "matmul";
        let Some(entered) = enter(CALL, stream)? else {
            return Ok(false);
        };
        let (Ok(device), Some(kind)) = (Device::get(&entered), self.kind(stream)) else {
            return Ok(false);
        };
        let room = workspace.map_or(0, Span::bytes);
        let plan = device.plan(&kind).filter(|plan| plan.workspace <= room);
        let objects = Objects::new(&device.library, &kind);
        let (Some(plan), Some(objects)) = (plan, objects) else {
            return Ok(false);
        };
        let (one, zero) = (Scale::of(kind.dtype, 1.0), Scale::of(kind.dtype, 0.0));
        let beta = if kind.adds { &one } else { &zero };
        let [a, b] =
            [self.b.ptr(), self.a.ptr()].map(|ptr| with_exposed_provenance(to_usize(ptr.0)));
        let out: *mut c_void = with_exposed_provenance_mut(to_usize(self.out.ptr().0));
        let scratch = workspace.map_or(null_mut(), |span| {
            with_exposed_provenance_mut(to_usize(span.ptr().0))
        });
        let library = &device.library;
        // SAFETY: the spans are live in order of this stream, and the launcher has checked that `out` overlaps no
        // operand. The layouts describe the spans, and the workspace is as large as the plan needs.
        let code = unsafe {
            (library.functions.cublasLtMatmul)(
                library.handle(),
                objects.product(),
                one.place(),
                a,
                objects.matrix(0),
                b,
                objects.matrix(1),
                beta.place(),
                out.cast_const(),
                objects.matrix(2),
                out,
                objects.matrix(2),
                &raw const plan.algorithm,
                scratch,
                to_usize(room),
                entered.handle.cast(),
            )
        };
        match code {
            SUCCESS => Ok(true),
            code => Err(Error::Driver {
                call: CALL,
                code,
                reason: "cublasLtMatmul failed; the code is the library's".to_owned(),
            }),
        }
    }

    /// The product as the library sees it; `None` if it cannot be expressed to the library.
    fn kind(&self, stream: &Stream) -> Option<Kind> {
        let (rows, columns) = (self.a.rows(), self.b.columns());
        if self.a.columns() == 0 || self.out.is_empty() || self.out.dtype() == DType::U32 {
            return None;
        }
        let alignment =
            |ptr: DevicePtr| 1_u32 << ptr.0.trailing_zeros().min(ALIGNMENT_MAX.trailing_zeros());
        let capability = stream.device().properties().compute_capability;
        Some(Kind {
            matrices: [
                Stored::transpose_of(self.b)?,
                Stored::transpose_of(self.a)?,
                Stored::dense(rows, columns)?,
            ],
            alignments: [self.b.ptr(), self.a.ptr(), self.out.ptr()].map(alignment),
            dtype: self.a.dtype(),
            out_dtype: self.out.dtype(),
            adds: self.accumulate == Accumulate::Add,
            workspace_max: WORKSPACE_MAX[usize::from(capability < Some((9, 0)))],
        })
    }
}

/// A factor on the host, in the type of the sums.
enum Scale {
    Single(f32),
    Double(f64),
}

impl Scale {
    fn of(dtype: DType, value: f32) -> Self {
        match dtype {
            DType::F64 => Self::Double(f64::from(value)),
            _ => Self::Single(value),
        }
    }

    fn place(&self) -> *const c_void {
        match self {
            Self::Single(value) => (&raw const *value).cast(),
            Self::Double(value) => (&raw const *value).cast(),
        }
    }
}
