//! Infinities and NaN at every kind of place, against what must become of them: not only do both devices agree, each
//! shows them where they were and nowhere else.

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::launch::{self, Activation, Span, StridedCopy};
use kitsune::optim::{Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, Device, HostConfig, Result, Stream, Tensor};

use super::support::{Side, on_each};
use crate::support::device::with_kernels;

/// More than a chunk of 65536, and no multiple of a pack.
pub(super) const LEN: usize = 65_536 + 4_099;

/// The first elements, those before the first aligned pack, both sides of pack, block and chunk borders, the middle, those
/// behind the last whole pack, and the last.
pub(super) const PLACES: [usize; 19] = [
    0,
    1,
    2,
    7,
    8,
    9,
    15,
    16,
    1_023,
    1_024,
    LEN / 2,
    65_534,
    65_535,
    65_536,
    65_537,
    LEN - 9,
    LEN - 4,
    LEN - 2,
    LEN - 1,
];

pub(super) const BAD: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

/// How many elements arrays are off their alignment.
pub(super) const LEADS: [usize; 3] = [0, 1, 3];

/// Ones, with another of [`BAD`] at each place; `turn` says which comes first.
pub(super) fn spoiled(turn: usize) -> Vec<f64> {
    let mut values = vec![1.0; LEN];
    for (number, place) in PLACES.into_iter().enumerate() {
        values[place] = BAD[(number + turn) % BAD.len()];
    }
    values
}

/// One that is alone of its kind at `place`.
pub(super) fn spoiled_at(place: usize, bad: f64) -> Vec<f64> {
    let mut values = vec![1.0; LEN];
    values[place] = bad;
    values
}

/// Of numbers that are not finite: the same one. Finite ones are all alike.
pub(super) fn same_kind(a: f64, b: f64) -> bool {
    a.is_finite() && b.is_finite() || a.is_nan() && b.is_nan() || a == b
}

/// A name, what reads `x` and writes `out`, and what it makes of an element that is not finite.
type OfOne = (
    &'static str,
    fn(&Stream, &Span, &Span) -> Result<()>,
    fn(f64) -> f64,
);

/// NaN of minus infinity: 0 times infinity.
fn gelu(x: f64) -> f64 {
    if x == f64::NEG_INFINITY { f64::NAN } else { x }
}

const KERNELS: [OfOne; 9] = [
    ("cast", launch::cast, |x| x),
    (
        "add",
        |stream, x, out| launch::add(stream, x, x, out),
        |x| x,
    ),
    (
        "mul",
        |stream, x, out| launch::mul(stream, x, out, out),
        |x| x,
    ),
    (
        "add_scaled",
        |stream, x, out| launch::add_scaled(stream, x, -0.5, out),
        |x| -x,
    ),
    (
        "relu",
        |stream, x, out| launch::activation(stream, Activation::Relu, x, out),
        |x| if x == f64::NEG_INFINITY { 0.0 } else { x },
    ),
    (
        "gelu",
        |stream, x, out| launch::activation(stream, Activation::Gelu, x, out),
        gelu,
    ),
    (
        "relu_backward",
        |stream, x, out| launch::activation_backward(stream, Activation::Relu, out, x, out),
        |x| x,
    ),
    // The density there is 0, which is multiplied by infinity.
    (
        "gelu_backward",
        |stream, x, out| launch::activation_backward(stream, Activation::Gelu, x, out, out),
        |x| if x.is_finite() { x } else { f64::NAN },
    ),
    (
        "copy_strided",
        |stream, x, out| {
            let copy = StridedCopy {
                shape: &[LEN],
                src: x,
                src_strides: &[1],
                dst: out,
                dst_strides: &[1],
            };
            launch::copy_strided(stream, &copy)
        },
        |x| x,
    ),
];

/// Launches on spoiled elements of this type, at every alignment: each must become what `becomes` says, and no other.
#[track_caller]
pub(super) fn assert_stay(
    what: &str,
    [from, to]: [DType; 2],
    becomes: impl Fn(f64) -> f64,
    launch: impl Fn(&Side, &Span, &Span),
) {
    for (turn, lead) in LEADS.into_iter().enumerate() {
        let values = spoiled(turn);
        let outputs = on_each(|side| {
            let x = side.array(from, lead, &values);
            // Ones, where a kernel reads them too.
            let out = side.array(to, (lead + turn) % 8, &[1.0; LEN]);
            launch(side, &x, &out);
            vec![out]
        });
        for (side, output) in outputs.iter().enumerate() {
            let mut pairs = values.iter().zip(&output[0]);
            let wrong = pairs.position(|(x, y)| !same_kind(becomes(*x), *y));
            assert_eq!(wrong, None, "{what} {from} {to} lead {lead} side {side}");
        }
    }
}

#[test]
fn elements_that_are_not_finite_stay_where_they_are() {
    for dtype in DType::FLOATS {
        for (name, launch, becomes) in KERNELS {
            assert_stay(name, [dtype; 2], becomes, |side, x, out| {
                launch(&side.stream, x, out).unwrap();
            });
        }
        assert_stay(
            "scale",
            [dtype; 2],
            |x| -x,
            |side, x, out| {
                let factor = side.array(DType::F32, 0, &[-2.0]);
                launch::scale(&side.stream, x, &factor, out).unwrap();
            },
        );
    }
}

#[test]
fn one_element_that_is_not_finite_shows_in_a_sum() {
    for dtype in DType::FLOATS {
        for bad in BAD {
            for (number, place) in PLACES.into_iter().enumerate() {
                let outputs = on_each(|side| {
                    let x = side.array(dtype, LEADS[number % 3], &spoiled_at(place, bad));
                    let [sum, mean] =
                        [(); 2].map(|()| side.rubbish(launch::sum_dtype(dtype), 0, 1));
                    launch::sum(&side.stream, &x, &sum).unwrap();
                    launch::mean(&side.stream, &x, &mean).unwrap();
                    vec![sum, mean]
                });
                for output in outputs {
                    assert!(
                        same_kind(output[0][0], bad) && same_kind(output[1][0], bad),
                        "{dtype} {bad} at {place}: {output:?}"
                    );
                }
            }
        }
    }
}

/// Rows and columns of an element that spoils its row, or its column, alone.
#[test]
fn one_element_of_a_matrix_spoils_its_row_or_column_alone() {
    const ROWS: usize = 70;
    const COLUMNS: usize = 67;
    for dtype in DType::FLOATS {
        for (row, column) in [
            (0, 0),
            (0, 66),
            (31, 31),
            (32, 32),
            (64, 63),
            (69, 0),
            (69, 66),
        ] {
            for bad in BAD {
                let mut values = vec![1.0; ROWS * COLUMNS];
                values[row * COLUMNS + column] = bad;
                let [twin, kernel] = on_each(|side| {
                    let x = side.array(dtype, 1, &values);
                    let sums = side.rubbish(dtype, 0, COLUMNS);
                    let best = side.rubbish(DType::U32, 0, ROWS);
                    let labels = side.array(DType::U32, 0, &[2.0; ROWS]);
                    let losses = side.rubbish(DType::F64, 0, ROWS);
                    let wide = launch::sum_dtype(dtype);
                    let (loss, p) = (side.rubbish(wide, 0, 1), side.rubbish(wide, 0, x.len()));
                    let stream = &side.stream;
                    launch::sum_rows(stream, &x, &sums).unwrap();
                    launch::argmax_rows(stream, &x, &best).unwrap();
                    launch::cross_entropy(stream, &x, &labels, &losses, &loss, &p).unwrap();
                    let seed = side.array(DType::F32, 0, &[4.0]);
                    let grad = side.rubbish(dtype, 1, x.len());
                    launch::cross_entropy_backward(stream, &p, &labels, &seed, &grad).unwrap();
                    let bias = side.array(dtype, 3, &values[..COLUMNS]);
                    let with_bias = side.rubbish(dtype, 0, x.len());
                    launch::add_bias(stream, &x, &bias, &with_bias).unwrap();
                    vec![sums, best, p, grad, with_bias]
                });
                for [sums, best, p, grad, with_bias] in
                    [twin, kernel].map(|side| <[_; 5]>::try_from(side).unwrap())
                {
                    let what = format!("{dtype} {bad} in row {row}, column {column}");
                    for (at, sum) in sums.iter().enumerate() {
                        assert!(
                            same_kind(*sum, if at == column { bad } else { 1.0 }),
                            "{what}"
                        );
                    }
                    let largest = if bad == f64::NEG_INFINITY {
                        usize::from(column == 0)
                    } else {
                        column
                    };
                    assert_eq!(best[row], largest as f64, "{what}");
                    for (at, (p, grad)) in p.iter().zip(&grad).enumerate() {
                        assert!(at / COLUMNS == row || p.is_finite(), "{what}");
                        assert_eq!(p.is_finite(), grad.is_finite(), "{what}");
                    }
                    for (at, sum) in with_bias.iter().enumerate() {
                        // The bias is the first row: one element there spoils its column.
                        let expected = values[at] + values[at % COLUMNS];
                        assert!(same_kind(*sum, expected), "{what}, with a bias");
                    }
                }
            }
        }
    }
}

/// A context on each of the two devices.
pub(super) fn contexts() -> [Context; 2] {
    let host = Device::host(HostConfig::default()).unwrap();
    [host.clone(), with_kernels(&host)].map(|device| Context::new(&device).unwrap())
}

fn of_dtype(context: &Context, dtype: DType, values: &[f64]) -> Tensor {
    let all = Tensor::from_slice(context, [values.len()], values).unwrap();
    all.cast(dtype).unwrap()
}

/// `values` in the middle of a larger tensor, `lead` elements past its start.
pub(super) fn misaligned(context: &Context, dtype: DType, lead: usize, values: &[f64]) -> Tensor {
    let all = [&vec![1.0; lead][..], values, &[1.0; 5]].concat();
    let tensor = of_dtype(context, dtype, &all);
    tensor.narrow(0, lead, values.len()).unwrap()
}

/// A small tensor before it, and one behind it.
pub(super) fn with_neighbours(context: &Context, dtype: DType, middle: Tensor) -> Vec<Parameter> {
    let small = || of_dtype(context, dtype, &[1.0; 33]);
    [small(), middle, small()]
        .into_iter()
        .enumerate()
        .map(|(number, value)| {
            let ones = Tensor::full(context, value.shape(), dtype, 1.0).unwrap();
            let parameter = Parameter::new(format!("w{number}"), ones).unwrap();
            parameter.set_grad(value).unwrap();
            parameter
        })
        .collect()
}

#[test]
fn one_gradient_that_is_not_finite_is_found_counted_and_placed() {
    for context in contexts() {
        let one = Tensor::full(&context, [], DType::F32, 1.0).unwrap();
        for dtype in DType::FLOATS {
            for (number, place) in PLACES.into_iter().enumerate() {
                for bad in BAD {
                    let what = format!("{dtype} {bad} at {place}");
                    let values = spoiled_at(place, bad);
                    let gradient = misaligned(&context, dtype, LEADS[number % 3], &values);
                    let parameters = with_neighbours(&context, dtype, gradient);
                    let mut sgd = Sgd::new(parameters, SgdConfig::default()).unwrap();
                    let mut scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
                    scaler.scale(&one).unwrap();
                    let outcome = scaler.step(&mut sgd).unwrap();
                    assert!(!outcome.is_applied().unwrap(), "{what}");
                    let reports = scaler.stats().unwrap().overflows;
                    let [tensor] = &reports[0].tensors[..] else {
                        panic!("{what}: {reports:?}");
                    };
                    let counts = (tensor.inf_count, tensor.nan_count, tensor.first_index);
                    let is_nan = u64::from(bad.is_nan());
                    assert_eq!(counts, (1 - is_nan, is_nan, place as u64), "{what}");
                }
            }
        }
    }
}
