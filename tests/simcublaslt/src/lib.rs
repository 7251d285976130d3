//! A stand-in for cuBLASLt, for tests of Kitsune where there is no GPU.
//!
//! It exports the functions that Kitsune calls, checks what it is told as the documentation demands, and computes
//! products by the documented formula: matrices by columns, sums in the compute type. Products run in order of
//! their stream on the simulated driver, where each overwrites its workspace first. Products with an odd inner
//! size are refused, so that callers need their other way too. Each call of `cublasLtMatmul` writes a line to the
//! file that the variable `SIMCUBLASLT` names.

#![cfg(target_os = "linux")]
#![allow(non_snake_case, reason = "the names are NVIDIA's")]

mod product;

use std::ffi::{c_int, c_void};
use std::fs::OpenOptions;
use std::io::Write;

use product::{Layout, Product};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 7;
const NOT_SUPPORTED: c_int = 15;

/// What the one algorithm is recognized by.
const ALGORITHM: u64 = 77;
/// Workspace that large products want.
const WORKSPACE: usize = 64 << 10;
/// What a handle is.
const HANDLE: usize = 0xb1a5;

/// What a product is described by: operations of both operands, and whether sums are made in f64.
#[derive(Default)]
pub struct Description {
    transposed: [c_int; 2],
    is_double: bool,
}

/// What an algorithm may rely on.
#[derive(Default)]
pub struct Preference {
    workspace: u64,
    schemes: u32,
    alignments: [u32; 4],
}

/// What is told of an algorithm.
#[repr(C)]
pub struct Answer {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

fn put<T>(place: *mut T, value: T) -> c_int {
    // SAFETY: whoever calls the library gives a place for the answer.
    unsafe { place.write(value) };
    SUCCESS
}

fn see<'a, T>(object: *const T) -> &'a T {
    // SAFETY: callers pass objects that were made here and are not destroyed yet.
    unsafe { &*object }
}

fn change<'a, T>(object: *mut T) -> &'a mut T {
    // SAFETY: as in `see`; an object is changed by one thread.
    unsafe { &mut *object }
}

fn destroy<T>(object: *mut T) -> c_int {
    // SAFETY: made by `Box::into_raw` below, and destroyed once.
    drop(unsafe { Box::from_raw(object) });
    SUCCESS
}

/// An attribute of a type, if `bytes` is its size.
fn value<T: Copy>(place: *const c_void, bytes: usize) -> Option<T> {
    // SAFETY: callers have `bytes` bytes there.
    (bytes == size_of::<T>()).then(|| unsafe { place.cast::<T>().read_unaligned() })
}

macro_rules! exports {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $body:block)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "` of cuBLASLt.")]
            ///
            /// # Safety
            /// As NVIDIA's documentation says.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> c_int $body
        )*
    };
}

exports! {
    fn cublasLtCreate(handle: *mut usize) { put(handle, HANDLE) }

    fn cublasLtMatmulDescCreate(description: *mut *mut Description, compute: c_int, scale: c_int) {
        let is_double = match (compute, scale) {
            (68, 0) => false,
            (70, 1) => true,
            _ => return INVALID_VALUE,
        };
        let new = Description { is_double, ..Description::default() };
        put(description, Box::into_raw(Box::new(new)))
    }

    fn cublasLtMatmulDescSetAttribute(
        description: *mut Description, attribute: c_int, place: *const c_void, bytes: usize
    ) {
        let operation = value::<c_int>(place, bytes).filter(|operation| [0, 1].contains(operation));
        let (3 | 4, Some(operation)) = (attribute, operation) else { return INVALID_VALUE };
        change(description).transposed[usize::from(attribute == 4)] = operation;
        SUCCESS
    }

    fn cublasLtMatmulDescDestroy(description: *mut Description) { destroy(description) }

    fn cublasLtMatrixLayoutCreate(
        layout: *mut *mut Layout, element: c_int, rows: u64, columns: u64, leading: i64
    ) {
        match Layout::new(element, rows, columns, leading) {
            Some(new) => put(layout, Box::into_raw(Box::new(new))),
            None => INVALID_VALUE,
        }
    }

    fn cublasLtMatrixLayoutDestroy(layout: *mut Layout) { destroy(layout) }

    fn cublasLtMatmulPreferenceCreate(preference: *mut *mut Preference) {
        put(preference, Box::into_raw(Box::default()))
    }

    fn cublasLtMatmulPreferenceSetAttribute(
        preference: *mut Preference, attribute: c_int, place: *const c_void, bytes: usize
    ) {
        let preference = change(preference);
        let small = value::<u32>(place, bytes);
        match (attribute, value::<u64>(place, bytes), small) {
            (1, Some(workspace), _) => preference.workspace = workspace,
            (3, _, Some(schemes)) => preference.schemes = schemes,
            (5..=8, _, Some(alignment)) => {
                preference.alignments[usize::try_from(attribute - 5).unwrap_or(0)] = alignment;
            }
            _ => return INVALID_VALUE,
        }
        SUCCESS
    }

    fn cublasLtMatmulPreferenceDestroy(preference: *mut Preference) { destroy(preference) }

    fn cublasLtMatmulAlgoGetHeuristic(
        handle: usize, description: *const Description, a: *const Layout, b: *const Layout, c: *const Layout,
        d: *const Layout, preference: *const Preference, _wanted: c_int, answer: *mut Answer, found: *mut c_int
    ) {
        let (description, preference) = (see(description), see(preference));
        let sizes = product::sizes(description.transposed, [see(a), see(b), see(c)]);
        let (Some([m, n, k]), true) = (sizes, handle == HANDLE && c == d) else { return INVALID_VALUE };
        let is_told = preference.schemes == 2 && preference.alignments.iter().all(|unit| unit.is_power_of_two());
        if k % 2 == 1 || !is_told {
            return NOT_SUPPORTED;
        }
        let workspace = if m * n * k > 4096 { WORKSPACE } else { 0 };
        if preference.workspace < workspace as u64 {
            return NOT_SUPPORTED;
        }
        put(found, 1);
        let [a, b, c, d] = preference.alignments.map(u64::from);
        let algorithm = [ALGORITHM, a, b, c, d, 0, 0, 0];
        put(answer, Answer { algorithm, workspace, state: SUCCESS, waves: 1.0, reserved: [0; 4] })
    }

    fn cublasLtMatmul(
        handle: usize, description: *const Description, alpha: *const c_void, a: usize, a_layout: *const Layout,
        b: usize, b_layout: *const Layout, beta: *const c_void, c: usize, c_layout: *const Layout, d: usize,
        d_layout: *const Layout, algorithm: *const [u64; 8], workspace: usize, workspace_bytes: usize,
        stream: usize
    ) {
        let description = see(description);
        let layouts = [a_layout, b_layout, c_layout];
        let Some([m, n, k]) = product::sizes(description.transposed, layouts.map(see)) else {
            return INVALID_VALUE;
        };
        let algorithm = see(algorithm);
        let aligned = [a, b, c, d].iter().zip(&algorithm[1..]).all(|(at, unit)| (*at as u64).is_multiple_of(*unit));
        let wanted = if m * n * k > 4096 { WORKSPACE } else { 0 };
        let has_room = wanted == 0 || workspace != 0 && workspace_bytes >= wanted;
        let is_right = handle == HANDLE && algorithm[0] == ALGORITHM && c == d && c_layout == d_layout;
        if !aligned || !has_room || !is_right {
            return INVALID_VALUE;
        }
        let scale = |place: *const c_void| {
            if description.is_double { *see(place.cast::<f64>()) } else { f64::from(*see(place.cast::<f32>())) }
        };
        let product = Product {
            sizes: [m, n, k],
            transposed: description.transposed.map(|operation| operation == 1),
            layouts: layouts.map(|layout| *see(layout)),
            addresses: [a, b, d],
            scales: [scale(alpha), scale(beta)],
            is_double: description.is_double,
            workspace: (workspace, wanted),
        };
        note(&product);
        product.enqueue(stream)
    }
}

fn note(product: &Product) {
    let Ok(path) = std::env::var("SIMCUBLASLT") else {
        return;
    };
    let file = OpenOptions::new().create(true).append(true).open(path);
    let mut file = file.expect("the test named a file");
    writeln!(file, "{:?} {}", product.sizes, product.workspace.1).expect("the file can be written");
}
