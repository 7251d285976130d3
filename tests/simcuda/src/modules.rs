//! Modules of PTX text, and kernels run by a library of the same source compiled for the host.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use crate::sim::{Code, Sim, code};

/// `kitsune_host_launch`: runs one entry point on the calling thread; 0 if it could.
type HostLaunch = unsafe extern "C" fn(
    entry: *const c_char,
    blocks: c_uint,
    threads: c_uint,
    shared: c_uint,
    arguments: *const c_void,
) -> c_int;

/// The opened library.
pub(crate) struct Shim {
    launch: HostLaunch,
    _library: libloading::Library,
}

/// An entry point of a module.
#[derive(Clone)]
pub(crate) struct Function {
    pub(crate) name: String,
    /// Bytes of each of its parameters.
    pub(crate) parameters: Vec<usize>,
}

/// A kernel with its arguments, as they were at the launch.
#[derive(Clone)]
pub(crate) struct Launch {
    pub(crate) entry: String,
    pub(crate) blocks: c_uint,
    pub(crate) threads: c_uint,
    pub(crate) shared: c_uint,
    /// The parameters as the fields of one struct. Words, so that it is aligned.
    pub(crate) arguments: Arc<[u64]>,
}

/// The newest PTX that a driver for this CUDA version understands, as (major, minor).
fn newest_ptx(version: c_int) -> (c_int, c_int) {
    (version / 1000 - 4, version % 1000 / 10)
}

/// Refuses text that is no PTX, and PTX that is newer than the driver.
pub(crate) fn check_ptx(text: &str, version: c_int) -> Result<(), Code> {
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(".version "));
    let stated = line
        .and_then(|line| line.trim().split_once('.'))
        .ok_or(code::INVALID_IMAGE)?;
    let (Ok(major), Ok(minor)) = (stated.0.parse(), stated.1.parse()) else {
        return Err(code::INVALID_IMAGE);
    };
    if (major, minor) > newest_ptx(version) {
        return Err(code::UNSUPPORTED_PTX_VERSION);
    }
    Ok(())
}

/// The entry point `name` of a PTX text.
pub(crate) fn find_entry(text: &str, name: &str) -> Result<Function, Code> {
    let ends = |rest: &&str| rest.trim_start().starts_with('(');
    let mut candidates = text
        .split(".entry ")
        .skip(1)
        .filter_map(|rest| rest.trim_start().strip_prefix(name));
    let parameters = candidates.find(ends).ok_or(code::NOT_FOUND)?;
    let parameters = parameters.split(')').next().unwrap_or_default();
    let sizes = parameters.split(".param").skip(1).map(parameter_bytes);
    Ok(Function {
        name: name.to_owned(),
        parameters: sizes.collect(),
    })
}

/// Parameters as the fields of a struct, each at a multiple of its size; a struct is at a multiple of 8.
///
/// # Safety
/// There are as many bytes at each of `places` as the parameter of the same number has.
pub(crate) unsafe fn gather(places: *const *const u8, parameters: &[usize]) -> Arc<[u64]> {
    let mut bytes: Vec<u8> = Vec::new();
    for (index, size) in parameters.iter().enumerate() {
        bytes.resize(bytes.len().next_multiple_of((*size).min(8)), 0);
        // SAFETY: there is a place for each parameter.
        let place = unsafe { places.add(index) };
        // SAFETY: as above.
        let place = unsafe { place.read() };
        // SAFETY: the caller promises so many bytes there.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(place, *size) });
    }
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let word = |word: &[u8]| u64::from_ne_bytes(word.try_into().expect("8 bytes"));
    bytes.chunks_exact(8).map(word).collect()
}

/// The size of a parameter such as `.align 8 .b8 name[40]` or `.u64 name`.
fn parameter_bytes(text: &str) -> usize {
    let bits = |word: &str| {
        word.trim_start_matches(|c: char| !c.is_ascii_digit())
            .parse::<usize>()
    };
    let kind = text.split_whitespace().find(|word| {
        word.starts_with(['.']) && *word != ".align" && *word != ".ptr" && bits(word).is_ok()
    });
    let count = text
        .split_once('[')
        .and_then(|(_, rest)| rest.split(']').next()?.parse().ok());
    kind.and_then(|kind| bits(kind).ok()).unwrap_or(0) / 8 * count.unwrap_or(1)
}

impl Sim {
    /// Runs a kernel by the shim library, which is opened at the first one.
    pub(crate) fn run_kernel(&mut self, launch: &Launch) -> Result<(), Code> {
        if self.shim.is_none() {
            self.shim = self.config.shim.as_deref().and_then(open);
        }
        let Some(shim) = &self.shim else {
            self.complaints
                .push(format!("no library to run {} by", launch.entry));
            return Err(code::LAUNCH_FAILED);
        };
        let entry = CString::new(launch.entry.as_str()).map_err(|_| code::LAUNCH_FAILED)?;
        let arguments = launch.arguments.as_ptr().cast();
        // SAFETY: the arguments are as long as the entry point's struct. That its addresses are good is what
        // whoever launched it promised.
        let done = unsafe {
            (shim.launch)(
                entry.as_ptr(),
                launch.blocks,
                launch.threads,
                launch.shared,
                arguments,
            )
        };
        if done == 0 {
            return Ok(());
        }
        self.complaints
            .push(format!("{} ended with {done}", launch.entry));
        Err(code::LAUNCH_FAILED)
    }
}

fn open(path: &str) -> Option<Shim> {
    // SAFETY: the library of kernels has no initializers worth the name.
    let library = unsafe { libloading::Library::new(path) }.ok()?;
    // SAFETY: the type is the one the library is built with.
    let launch = *unsafe { library.get::<HostLaunch>(b"kitsune_host_launch\0") }.ok()?;
    Some(Shim {
        launch,
        _library: library,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = ".version 8.0\n.target sm_80\n.visible .entry fill_f32(\n\t.param .align 8 .b8 \
                        fill_f32_param_0[40]\n)\n{\nret;\n}\n.visible .entry fill(.param .u64 a, .param .u32 b){ret;}";

    #[test]
    fn entries_are_found_by_their_whole_name() {
        assert_eq!(
            find_entry(TEXT, "fill_f32").map(|entry| entry.parameters),
            Ok(vec![40])
        );
        assert_eq!(
            find_entry(TEXT, "fill").map(|entry| entry.parameters),
            Ok(vec![8, 4])
        );
        assert_eq!(
            find_entry(TEXT, "fill_f").map(|entry| entry.parameters),
            Err(code::NOT_FOUND)
        );
    }

    #[test]
    fn parameters_lie_where_a_struct_has_them() {
        let (a, b, c) = (7_u32, 8_u64, 9_u32);
        let places: [*const u8; 3] = [
            (&raw const a).cast(),
            (&raw const b).cast(),
            (&raw const c).cast(),
        ];
        // SAFETY: the sizes are those of the numbers.
        let gathered = unsafe { gather(places.as_ptr(), &[4, 8, 4]) };
        assert_eq!(*gathered, [7, 8, 9]);
    }

    #[test]
    fn new_ptx_is_refused_by_an_old_driver() {
        assert_eq!(check_ptx(TEXT, 12_000), Ok(()));
        assert_eq!(
            check_ptx(".version 8.1", 12_000),
            Err(code::UNSUPPORTED_PTX_VERSION)
        );
        assert_eq!(check_ptx(".version 9.0", 13_000), Ok(()));
        assert_eq!(check_ptx("hello", 13_000), Err(code::INVALID_IMAGE));
    }
}
