//! The same launches on two devices: twins on one, device kernels on the other, which is the shim or a GPU.
#![allow(unsafe_code, reason = "spans are made of plain addresses")]

use std::cell::RefCell;
use std::sync::OnceLock;

use kitsune::driver::DevicePtr;
use kitsune::launch::Span;
use kitsune::{DType, Device, Element, F8E4M3, F8E5M2, HostConfig, Stream, bf16, f16};

use crate::support::device::{on_gpu, with_kernels};

/// Lengths that reach every path: none, one, around a pack and a block, odd, many blocks. `KITSUNE_TEST_LARGE=0` keeps
/// the last one to a few blocks, for devices that are slow.
pub(crate) fn lengths() -> [usize; 12] {
    let many = if is_large() == Some(false) {
        20_003
    } else {
        100_003
    };
    [0, 1, 2, 7, 8, 9, 31, 255, 257, 1023, 4099, many]
}

/// Ten million elements where they take seconds, in a release build; elsewhere enough for several blocks, warps and
/// chunks. `KITSUNE_TEST_LARGE` decides otherwise, by 1 or 0.
pub(crate) fn large() -> usize {
    if is_large().unwrap_or(!cfg!(debug_assertions)) {
        10_000_007
    } else {
        200_007
    }
}

fn is_large() -> Option<bool> {
    match std::env::var("KITSUNE_TEST_LARGE").as_deref() {
        Ok("1") => Some(true),
        Ok("0") => Some(false),
        _ => None,
    }
}

/// The types that convert into each other.
pub(crate) fn floats() -> impl Iterator<Item = DType> {
    DType::FLOATS.into_iter().chain(DType::F8)
}

/// Elements before the first, by which arrays miss the alignment of packs.
pub(crate) const LEADS: [usize; 4] = [0, 1, 3, 8];

/// Written around the elements; a kernel that writes past the ends changes it.
const GUARD: u8 = 0xa5;
const GUARD_BYTES: usize = 64;

/// A device with one stream, and the arrays on it.
pub(crate) struct Side {
    pub(crate) stream: Stream,
    arrays: RefCell<Vec<(DevicePtr, usize)>>,
}

impl Side {
    fn new(device: &Device) -> Self {
        let arrays = RefCell::default();
        let stream = device.create_stream().unwrap();
        Self { stream, arrays }
    }

    /// `values`, rounded to `dtype`, `lead` elements past an aligned address.
    pub(crate) fn array(&self, dtype: DType, lead: usize, values: &[f64]) -> Span {
        self.bytes(dtype, lead, &to_bytes(dtype, values))
    }

    /// As [`array`](Self::array), for `len` elements of rubbish.
    pub(crate) fn rubbish(&self, dtype: DType, lead: usize, len: usize) -> Span {
        self.bytes(dtype, lead, &vec![0x5a; len * size_of(dtype)])
    }

    fn bytes(&self, dtype: DType, lead: usize, bytes: &[u8]) -> Span {
        let start = GUARD_BYTES + lead * size_of(dtype);
        let mut all = vec![GUARD; start + bytes.len() + GUARD_BYTES];
        all[start..start + bytes.len()].copy_from_slice(bytes);
        let driver = self.stream.driver();
        let base = driver.allocate(all.len() as u64).unwrap();
        self.arrays.borrow_mut().push((base, all.len()));
        // SAFETY: the memory was just allocated with this size, and lives as long as this side.
        unsafe { driver.copy_from_host(base, &all, self.stream.raw()) }.unwrap();
        let len = bytes.len() / size_of(dtype);
        // SAFETY: as above; nothing else uses the memory.
        unsafe { Span::new(base.offset(start as u64), len, dtype, self.stream.id()) }
    }

    /// The bytes of `span`, after checking that what surrounds it is as it was.
    #[track_caller]
    fn read(&self, span: &Span) -> Vec<u8> {
        let arrays = self.arrays.borrow();
        let at = span.ptr().0;
        let holds =
            |(base, len): &&(DevicePtr, usize)| (base.0..base.0 + *len as u64).contains(&at);
        let (base, len) = *arrays.iter().find(holds).expect("an array of this side");
        let mut all = vec![0; len];
        let driver = self.stream.driver();
        // SAFETY: an allocation of this side, of this size.
        unsafe { driver.copy_to_host(&mut all, base, self.stream.raw()) }.unwrap();
        let start = usize::try_from(at - base.0).unwrap();
        let end = start + usize::try_from(span.bytes()).unwrap();
        let around = all[..start].iter().chain(&all[end..]);
        assert!(
            around.clone().all(|byte| *byte == GUARD),
            "written outside the array"
        );
        all[start..end].to_vec()
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // A stream that failed has reported so; its memory is freed all the same.
        let _ = self.stream.synchronize();
        for (base, _) in self.arrays.borrow().iter() {
            // SAFETY: the stream is idle, and nothing else uses the memory.
            let _ = unsafe { self.stream.driver().free(*base) };
        }
    }
}

/// A host device, and the same with device kernels.
fn devices() -> &'static [Device; 2] {
    static DEVICES: OnceLock<[Device; 2]> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let host = Device::host(HostConfig::default()).unwrap();
        [host.clone(), with_kernels(&host)]
    })
}

/// How near results of formulas with the library's `exp` must be: on a GPU that is another one in f64.
pub(crate) fn of_library(dtypes: [DType; 2]) -> Nearness {
    if on_gpu() && dtypes.contains(&DType::F64) {
        Nearness::Ulps(8.0, 1e-13)
    } else {
        Nearness::Bits
    }
}

/// How near two results must be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Nearness {
    /// The same bits; any NaN is like any other.
    Bits,
    /// So many units in the last place of the type, of the larger magnitude, or the absolute difference.
    Ulps(f64, f64),
}

/// Launches on twins, on device kernels, and on device kernels in reverse order (on a GPU: once more), and compares: the
/// last two to the bit, the first two as `nearness` says. `launch` returns the arrays to compare.
#[track_caller]
pub(crate) fn compare(what: &str, nearness: Nearness, launch: impl Fn(&Side) -> Vec<Span>) {
    let sides = devices().each_ref().map(Side::new);
    let mut results = Vec::new();
    for (side, reversed) in [(0, false), (1, false), (1, true)] {
        kitsune_shim::reverse(reversed);
        let outputs = launch(&sides[side]);
        sides[side].stream.synchronize().unwrap();
        let read = |span: &Span| (span.dtype(), sides[side].read(span));
        results.push(outputs.iter().map(read).collect::<Vec<_>>());
    }
    kitsune_shim::reverse(false);
    for (number, ((twin, kernel), reversed)) in results[0]
        .iter()
        .zip(&results[1])
        .zip(&results[2])
        .enumerate()
    {
        let what = format!("{what}, output {number}");
        assert_near(
            &format!("{what}, reversed"),
            Nearness::Bits,
            kernel,
            reversed,
        );
        assert_near(&what, nearness, twin, kernel);
    }
}

/// What each of the two devices makes of a launch, as numbers.
pub(crate) fn on_each(launch: impl Fn(&Side) -> Vec<Span>) -> [Vec<Vec<f64>>; 2] {
    devices().each_ref().map(|device| {
        let side = Side::new(device);
        let outputs = launch(&side);
        side.stream.synchronize().unwrap();
        let values = |span: &Span| to_values(span.dtype(), &side.read(span));
        outputs.iter().map(values).collect()
    })
}

#[track_caller]
fn assert_near(
    what: &str,
    nearness: Nearness,
    (dtype, a): &(DType, Vec<u8>),
    b: &(DType, Vec<u8>),
) {
    let (left, right) = (to_values(*dtype, a), to_values(*dtype, &b.1));
    let size = size_of(*dtype);
    for (at, (x, y)) in left.iter().zip(&right).enumerate() {
        let same_bits = a[at * size..][..size] == b.1[at * size..][..size];
        let near = match nearness {
            _ if same_bits || x.is_nan() && y.is_nan() => true,
            Nearness::Ulps(ulps, absolute) if x.is_finite() && y.is_finite() => {
                let scale = x.abs().max(y.abs()) * dtype.epsilon();
                (x - y).abs() <= absolute + ulps * scale
            }
            _ => false,
        };
        assert!(
            near,
            "{what}: element {at} is {x:e} on the host, {y:e} from the kernel"
        );
    }
}

fn size_of(dtype: DType) -> usize {
    usize::try_from(dtype.bits() / 8).unwrap()
}

fn to_bytes(dtype: DType, values: &[f64]) -> Vec<u8> {
    fn as_type<T: Element>(values: &[f64]) -> Vec<u8> {
        let values: Vec<T> = values
            .iter()
            .map(|value| <T as Element>::from_f64(*value))
            .collect();
        bytemuck::cast_slice(&values).to_vec()
    }
    match dtype {
        DType::F16 => as_type::<f16>(values),
        DType::Bf16 => as_type::<bf16>(values),
        DType::F32 => as_type::<f32>(values),
        DType::F64 => as_type::<f64>(values),
        DType::F8E4M3 => as_type::<F8E4M3>(values),
        DType::F8E5M2 => as_type::<F8E5M2>(values),
        _ => as_type::<u32>(values),
    }
}

fn to_values(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    fn of_type<T: Element>(bytes: &[u8]) -> Vec<f64> {
        let values = bytes.chunks_exact(std::mem::size_of::<T>());
        values
            .map(|bytes| bytemuck::pod_read_unaligned::<T>(bytes).to_f64())
            .collect()
    }
    match dtype {
        DType::F16 => of_type::<f16>(bytes),
        DType::Bf16 => of_type::<bf16>(bytes),
        DType::F32 => of_type::<f32>(bytes),
        DType::F64 => of_type::<f64>(bytes),
        DType::F8E4M3 => of_type::<F8E4M3>(bytes),
        DType::F8E5M2 => of_type::<F8E5M2>(bytes),
        _ => of_type::<u32>(bytes),
    }
}

/// `len` numbers spread over (-`range`, `range`), the same ones on every run.
pub(crate) fn numbers(seed: u64, len: usize, range: f64) -> Vec<f64> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len)
        .map(|_| (2.0 * random.f64() - 1.0) * range)
        .collect()
}

/// As [`numbers`], with what is not an ordinary number at both ends, inside and around the first packs.
pub(crate) fn with_specials(seed: u64, len: usize, range: f64) -> Vec<f64> {
    const SPECIALS: [f64; 10] = [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        -0.0,
        1e-7,
        -1e-40,
        65_519.0,
        65_520.0,
        3.4e38,
        1.0 + 1.0 / 2048.0 + 1e-12,
    ];
    let mut values = numbers(seed, len, range);
    let places = [
        0,
        1,
        2,
        6,
        7,
        8,
        15,
        16,
        17,
        len / 2,
        len.saturating_sub(2),
        len.saturating_sub(1),
    ];
    for (number, place) in places.into_iter().enumerate() {
        if let Some(value) = values.get_mut(place) {
            let shift = usize::try_from(seed).unwrap();
            *value = SPECIALS[(number + shift) % SPECIALS.len()];
        }
    }
    values
}
