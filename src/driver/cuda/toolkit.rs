//! Finds libraries of the CUDA toolkit. This crate requires none of them; it uses cuBLASLt if found.

use std::fs;
use std::path::PathBuf;

/// The libraries to look for, each with its versioned file names, newest first.
const LIBRARIES: [(&str, &[&str]); 4] = [
    (
        "NVRTC",
        &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
    ),
    (
        "cuBLAS",
        &["libcublas.so.13", "libcublas.so.12", "libcublas.so"],
    ),
    (
        "cuBLASLt",
        &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
    ),
    ("NCCL", &["libnccl.so.2", "libnccl.so"]),
];

/// A library of the toolkit.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ToolkitLibrary {
    /// Its name, for display.
    pub name: &'static str,
    /// The file it was loaded from; `None` if it cannot be loaded.
    pub file: Option<PathBuf>,
}

/// Looks for the toolkit libraries that CUDA programs commonly use, by loading them.
#[must_use]
pub fn toolkit() -> Vec<ToolkitLibrary> {
    let found = |names: &[&str]| names.iter().find_map(|name| load(name));
    LIBRARIES
        .iter()
        .map(|(name, names)| ToolkitLibrary {
            name,
            file: found(names),
        })
        .collect()
}

/// Loads the library and returns the file it came from.
fn load(name: &str) -> Option<PathBuf> {
    // SAFETY: these are NVIDIA's libraries, which are made to be loaded; loading runs their initializers.
    let library = unsafe { libloading::Library::new(name) }.ok()?;
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    drop(library);
    let stem = name.split(".so").next().unwrap_or(name);
    let holds = |path: &&str| {
        path.rsplit('/')
            .next()
            .is_some_and(|file| file.starts_with(&format!("{stem}.so")))
    };
    let mut paths = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]));
    Some(PathBuf::from(paths.find(holds).unwrap_or(name)))
}
