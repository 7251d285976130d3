//! Matrices by columns, and their products.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use half::{bf16, f16};

/// A matrix: element (row, column) lies at `row + column · leading`.
#[derive(Clone, Copy)]
pub struct Layout {
    element: Element,
    rows: usize,
    columns: usize,
    leading: usize,
}

#[derive(Clone, Copy)]
enum Element {
    F32,
    F64,
    F16,
    Bf16,
}

impl Layout {
    /// `None` for what the documentation does not allow.
    pub(crate) fn new(element: c_int, rows: u64, columns: u64, leading: i64) -> Option<Self> {
        let element = match element {
            0 => Element::F32,
            1 => Element::F64,
            2 => Element::F16,
            14 => Element::Bf16,
            _ => return None,
        };
        let leading = usize::try_from(leading).ok()?;
        let (rows, columns) = (usize::try_from(rows).ok()?, usize::try_from(columns).ok()?);
        (rows > 0 && columns > 0 && leading >= rows).then_some(Self {
            element,
            rows,
            columns,
            leading,
        })
    }

    fn place(&self, base: usize, row: usize, column: usize) -> usize {
        let size = match self.element {
            Element::F64 => 8,
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        };
        base + (row + column * self.leading) * size
    }

    fn get(&self, base: usize, row: usize, column: usize) -> f64 {
        let at = std::ptr::with_exposed_provenance::<c_void>(self.place(base, row, column));
        match self.element {
            // SAFETY: the caller of the library promised the matrix; the same for those below.
            Element::F32 => f64::from(unsafe { at.cast::<f32>().read() }),
            // SAFETY: as above.
            Element::F64 => unsafe { at.cast::<f64>().read() },
            // SAFETY: as above.
            Element::F16 => f64::from(unsafe { at.cast::<f16>().read() }),
            // SAFETY: as above.
            Element::Bf16 => f64::from(unsafe { at.cast::<bf16>().read() }),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "rounding is what is asked for"
    )]
    fn put(&self, base: usize, row: usize, column: usize, value: f64) {
        let at = std::ptr::with_exposed_provenance_mut::<c_void>(self.place(base, row, column));
        match self.element {
            // SAFETY: the caller of the library promised the matrix; the same for those below.
            Element::F32 => unsafe { at.cast::<f32>().write(value as f32) },
            // SAFETY: as above.
            Element::F64 => unsafe { at.cast::<f64>().write(value) },
            // SAFETY: as above.
            Element::F16 => unsafe { at.cast::<f16>().write(f16::from_f32(value as f32)) },
            // SAFETY: as above.
            Element::Bf16 => unsafe { at.cast::<bf16>().write(bf16::from_f32(value as f32)) },
        }
    }
}

/// Rows, columns and inner size of the product of these matrices, the last of which is its place; `None` if they
/// do not fit.
pub(crate) fn sizes(transposed: [c_int; 2], [a, b, c]: [&Layout; 3]) -> Option<[usize; 3]> {
    let shape = |layout: &Layout, transposed| match transposed {
        0 => (layout.rows, layout.columns),
        _ => (layout.columns, layout.rows),
    };
    let ((m, k), (k_too, n)) = (shape(a, transposed[0]), shape(b, transposed[1]));
    (k == k_too && (c.rows, c.columns) == (m, n)).then_some([m, n, k])
}

/// A product with its addresses.
pub(crate) struct Product {
    pub(crate) sizes: [usize; 3],
    pub(crate) transposed: [bool; 2],
    pub(crate) layouts: [Layout; 3],
    pub(crate) addresses: [usize; 3],
    /// Of the product, and of what its place held.
    pub(crate) scales: [f64; 2],
    pub(crate) is_double: bool,
    /// Address and bytes wanted.
    pub(crate) workspace: (usize, usize),
}

impl Product {
    /// Puts it on a stream of the driver, and gives the driver's code. It is never freed: a graph may run it at
    /// any time.
    pub(crate) fn enqueue(self, stream: usize) -> c_int {
        type LaunchHostFunc =
            unsafe extern "C" fn(usize, extern "C" fn(*mut c_void), *mut c_void) -> c_int;
        static DRIVER: OnceLock<libloading::Library> = OnceLock::new();
        let driver = DRIVER.get_or_init(|| {
            // SAFETY: the simulated driver.
            unsafe { libloading::Library::new("libcuda.so.1") }.expect("the program has it open")
        });
        // SAFETY: this is the function's type.
        let launch = unsafe { driver.get::<LaunchHostFunc>(b"cuLaunchHostFunc\0") };
        let launch = launch.expect("the simulated driver has it");
        let product: *mut Self = Box::into_raw(Box::new(self));
        // SAFETY: `run` takes a product.
        unsafe { launch(stream, run, product.cast()) }
    }

    #[expect(clippy::cast_possible_truncation, reason = "sums are made in f32")]
    fn compute(&self) {
        let (scratch, bytes) = self.workspace;
        let scratch = std::ptr::with_exposed_provenance_mut::<u8>(scratch);
        // SAFETY: the caller of the library gave it so much workspace.
        unsafe { scratch.write_bytes(0xff, bytes) };
        let [m, n, k] = self.sizes;
        let [a, b, c] = &self.layouts;
        let [a_at, b_at, c_at] = self.addresses;
        let at = |layout: &Layout, base, row, column, transposed| match transposed {
            false => layout.get(base, row, column),
            true => layout.get(base, column, row),
        };
        for column in 0..n {
            for row in 0..m {
                let mut sum = 0.0;
                for inner in 0..k {
                    sum += at(a, a_at, row, inner, self.transposed[0])
                        * at(b, b_at, inner, column, self.transposed[1]);
                    sum = if self.is_double {
                        sum
                    } else {
                        f64::from(sum as f32)
                    };
                }
                let [alpha, beta] = self.scales;
                let held = if beta == 0.0 {
                    0.0
                } else {
                    beta * c.get(c_at, row, column)
                };
                c.put(c_at, row, column, alpha * sum + held);
            }
        }
    }
}

extern "C" fn run(product: *mut c_void) {
    // SAFETY: `enqueue` passed a product, which is never freed.
    let product = unsafe { &*product.cast::<Product>() };
    product.compute();
}
