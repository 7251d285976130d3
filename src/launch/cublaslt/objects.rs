//! The library's objects that describe a product, owned and destroyed on drop.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cublasLtReductionScheme_t,
    cudaDataType,
};

use super::layout::Stored;
use super::library::{Library, SUCCESS};
use super::{Kind, Plan};
use crate::dtype::DType;

/// The description of a product and of its matrices.
pub(super) struct Objects<'a> {
    library: &'a Library,
    product: cublasLtMatmulDesc_t,
    matrices: [cublasLtMatrixLayout_t; 3],
}

/// The library's answer about an algorithm: cudarc's struct, but with the status as a plain number.
#[repr(C)]
struct Answer {
    algorithm: cublasLtMatmulAlgo_t,
    workspace: usize,
    state: c_int,
    _waves: f32,
    _reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Answer>() == size_of::<cublasLtMatmulHeuristicResult_t>());

/// The operation on an operand, in the library's numbers: none, or transpose.
const OPERATIONS: [i32; 2] = [0, 1];

/// The library's name of an element type.
pub(super) fn element_type(dtype: DType) -> cudaDataType {
    match dtype {
        DType::F16 => cudaDataType::CUDA_R_16F,
        DType::Bf16 => cudaDataType::CUDA_R_16BF,
        DType::F64 => cudaDataType::CUDA_R_64F,
        DType::F32 | DType::U32 => cudaDataType::CUDA_R_32F,
        DType::F8E4M3 => cudaDataType::CUDA_R_8F_E4M3,
        DType::F8E5M2 => cudaDataType::CUDA_R_8F_E5M2,
    }
}

impl<'a> Objects<'a> {
    /// `None` if the library refuses.
    pub(super) fn new(library: &'a Library, kind: &Kind) -> Option<Self> {
        use cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB,
        };
        // If construction fails, dropping this destroys what was created so far.
        let mut objects = Self {
            library,
            product: null_mut(),
            matrices: [null_mut(); 3],
        };
        let (compute, scale) = match kind.dtype {
            DType::F64 => (cublasComputeType_t::CUBLAS_COMPUTE_64F, DType::F64),
            _ => (cublasComputeType_t::CUBLAS_COMPUTE_32F, DType::F32),
        };
        let create = library.functions.cublasLtMatmulDescCreate;
        // SAFETY: `product` receives the result.
        let code = unsafe { create(&raw mut objects.product, compute, element_type(scale)) };
        succeeded(code)?;
        let operands = [CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB];
        for (attribute, stored) in operands.into_iter().zip(&kind.matrices) {
            let operation = &OPERATIONS[usize::from(stored.is_transposed)];
            let place = (&raw const *operation).cast::<c_void>();
            let set = library.functions.cublasLtMatmulDescSetAttribute;
            // SAFETY: the description is alive; the attribute is a 32-bit number.
            succeeded(unsafe { set(objects.product, attribute, place, size_of::<i32>()) })?;
        }
        let dtypes = [kind.dtype, kind.dtype, kind.out_dtype];
        for (index, (stored, dtype)) in kind.matrices.iter().zip(dtypes).enumerate() {
            objects.matrices[index] = objects.describe(stored, dtype)?;
        }
        Some(objects)
    }

    fn describe(&self, stored: &Stored, dtype: DType) -> Option<cublasLtMatrixLayout_t> {
        let create = self.library.functions.cublasLtMatrixLayoutCreate;
        let (mut layout, dtype) = (null_mut(), element_type(dtype));
        let (rows, columns, leading) = (stored.rows, stored.columns, stored.leading);
        // SAFETY: `layout` receives the result.
        succeeded(unsafe { create(&raw mut layout, dtype, rows, columns, leading) })?;
        Some(layout)
    }

    pub(super) fn product(&self) -> cublasLtMatmulDesc_t {
        self.product
    }

    /// The description of a matrix by its index in [`Kind::matrices`].
    pub(super) fn matrix(&self, index: usize) -> cublasLtMatrixLayout_t {
        self.matrices[index]
    }

    /// The algorithm that the library expects to be fastest; `None` if it has none.
    pub(super) fn choose(&self, kind: &Kind) -> Option<Plan> {
        let preference = Preference::new(self.library, kind)?;
        let [a, b, out] = self.matrices;
        let choose = self.library.functions.cublasLtMatmulAlgoGetHeuristic;
        let mut answer = Answer {
            algorithm: cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace: 0,
            state: 0,
            _waves: 0.0,
            _reserved: [0; 4],
        };
        let place = (&raw mut answer).cast();
        let mut found: c_int = 0;
        // SAFETY: all descriptions are alive, and there is room for one result.
        let code = unsafe {
            choose(
                self.library.handle(),
                self.product,
                a,
                b,
                out,
                out,
                preference.object,
                1,
                place,
                &raw mut found,
            )
        };
        succeeded(code)?;
        (found > 0 && answer.state == SUCCESS).then_some(Plan {
            algorithm: answer.algorithm,
            workspace: answer.workspace as u64,
        })
    }
}

impl Drop for Objects<'_> {
    fn drop(&mut self) {
        let functions = &self.library.functions;
        for layout in self.matrices.into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: created here, and used by nothing else.
            let _ = unsafe { (functions.cublasLtMatrixLayoutDestroy)(layout) };
        }
        if !self.product.is_null() {
            // SAFETY: as above.
            let _ = unsafe { (functions.cublasLtMatmulDescDestroy)(self.product) };
        }
    }
}

/// The constraints on the choice of an algorithm.
struct Preference<'a> {
    library: &'a Library,
    object: cublasLtMatmulPreference_t,
}

impl<'a> Preference<'a> {
    fn new(library: &'a Library, kind: &Kind) -> Option<Self> {
        use cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        };
        let mut object = null_mut();
        // SAFETY: `object` receives the result.
        let code = unsafe { (library.functions.cublasLtMatmulPreferenceCreate)(&raw mut object) };
        succeeded(code)?;
        let preference = Self { library, object };
        let set = |attribute, place: *const c_void, bytes| {
            let set = library.functions.cublasLtMatmulPreferenceSetAttribute;
            // SAFETY: the object is alive; the callers below pass numbers of the attributes' widths.
            succeeded(unsafe { set(object, attribute, place, bytes) })
        };
        let workspace = kind.workspace_max;
        let place = (&raw const workspace).cast();
        set(
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            place,
            size_of::<u64>(),
        )?;
        let schemes = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let place = (&raw const schemes).cast();
        set(
            CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            place,
            size_of::<u32>(),
        )?;
        let [a, b, out] = kind.alignments;
        for (attribute, bytes) in [
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
            (CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
        ] {
            set(attribute, (&raw const bytes).cast(), size_of::<u32>())?;
        }
        Some(preference)
    }
}

impl Drop for Preference<'_> {
    fn drop(&mut self) {
        // SAFETY: created here, and used by nothing else.
        let _ = unsafe { (self.library.functions.cublasLtMatmulPreferenceDestroy)(self.object) };
    }
}

fn succeeded(code: c_int) -> Option<()> {
    (code == SUCCESS).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_attributes_have_the_numbers_of_the_documentation() {
        let number = |dtype| element_type(dtype) as u32;
        assert_eq!(
            [DType::F16, DType::Bf16, DType::F32, DType::F64].map(number),
            [2, 14, 0, 1]
        );
        assert_eq!(cublasComputeType_t::CUBLAS_COMPUTE_32F as u32, 68);
        assert_eq!(cublasComputeType_t::CUBLAS_COMPUTE_64F as u32, 70);
        let scheme = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
        assert_eq!(scheme as u32, 2, "partial sums in the compute type only");
    }
}
