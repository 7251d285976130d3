//! Matrix products by cuBLASLt, where the machine has it.
//!
//! The library is looked for at the first product on a device. What it refuses, or cannot read where it lies,
//! goes to the kernel of this crate; so does everything where it is missing. Sums are made in the type that the
//! kernel makes them in, and rounded once: algorithms that add partial sums in the type of the output are ruled
//! out, as are reduced-precision products of f32.
//!
//! A *plan* is an algorithm and the bytes of workspace it wants. It is chosen once for each kind of product and
//! kept, so the same sizes give the same bits throughout a process. Enqueuing takes no memory and waits for
//! nothing: products can be captured.
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

/// Workspace an algorithm may want: what NVIDIA recommends for devices since compute capability 9.0, and before.
const WORKSPACE_MAX: [u64; 2] = [32 << 20, 4 << 20];
/// The alignment beyond which the library makes no difference.
const ALIGNMENT_MAX: u32 = 256;
/// Plans kept for a device. Programs whose shapes vary without end begin anew.
const PLANS_MAX: usize = 4096;

/// A product as the library sees it, without its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    /// The library's operands: `b`, `a`, and what it writes.
    matrices: [Stored; 3],
    /// Their alignments in bytes.
    alignments: [u32; 3],
    dtype: DType,
    out_dtype: DType,
    adds: bool,
    workspace_max: u64,
}

/// An algorithm, and what it wants.
#[derive(Clone, Copy)]
struct Plan {
    algorithm: cublasLtMatmulAlgo_t,
    workspace: u64,
}

/// The library on one device, with the plans made so far; `None` for products that it refuses.
struct Device {
    library: Library,
    plans: Mutex<HashMap<Kind, Option<Plan>>>,
}

/// The product that is to be enqueued. Sizes, types and streams were checked.
pub(super) struct Product<'a> {
    pub(super) a: &'a Matrix,
    pub(super) b: &'a Matrix,
    pub(super) out: &'a Span,
    pub(super) accumulate: Accumulate,
}

/// Why products on the CUDA device with this number are not made by cuBLASLt; `None` if they are.
///
/// # Errors
/// [`Error::Driver`] if the device cannot be opened.
pub fn why_not_cublaslt(ordinal: u32) -> Result<Option<String>> {
    let stream = crate::driver::Device::cuda(ordinal)?.create_stream()?;
    let entered = enter("matmul", &stream)?;
    Ok(entered.and_then(|entered| Device::get(&entered).err()))
}

impl Device {
    /// The library on the device that was entered, or why it cannot be used. Asked once for each device.
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
    /// Bytes of workspace that the product wants, 0 if the library does not make it.
    pub(super) fn workspace(&self, stream: &Stream) -> u64 {
        let entered = enter("matmul", stream).ok().flatten();
        let device = entered.and_then(|entered| Device::get(&entered).ok());
        let plan = device
            .zip(self.kind(stream))
            .and_then(|(device, kind)| device.plan(&kind));
        plan.map_or(0, |plan| plan.workspace)
    }

    /// Enqueues the product; `false` if the library does not make it, and nothing was enqueued.
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
        // SAFETY: the spans are live in order of this stream, and the launcher has checked that `out` overlaps
        // no operand; the layouts describe them; the workspace is as long as the plan wants.
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
                reason: "cublasLtMatmul: the library's own number for the failure".to_owned(),
            }),
        }
    }

    /// The product as the library would be asked for it; `None` if it cannot be.
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

/// A factor on the host, in the type that sums are made in.
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
