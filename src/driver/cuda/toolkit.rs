//! Libraries of the CUDA toolkit. This crate needs none; cuBLASLt is used where it is found.

use std::fs;
use std::path::PathBuf;

/// What is looked for, with the names of its versions, newest first.
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

/// A library of the toolkit, and the file it was loaded from; `None` if it cannot be loaded.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ToolkitLibrary {
    /// Its name, for people.
    pub name: &'static str,
    /// Where it is.
    pub file: Option<PathBuf>,
}

/// Looks for the libraries of the toolkit that programs with CUDA commonly use, by loading them.
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

/// The file that a library of this name was loaded from.
fn load(name: &str) -> Option<PathBuf> {
    // SAFETY: NVIDIA's libraries; loading them runs their initializers, which is what they are made for.
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
