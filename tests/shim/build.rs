//! Compiles kernels/*.cu with a C++ compiler (`CXX`, else g++), as a shared and as a static library.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// A formula must give the bits that the device and the Rust twin give: nothing is contracted. Fibers jump
/// between stacks, which the hardened `longjmp` refuses.
const FLAGS: [&str; 7] = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-Wno-unknown-pragmas",
];

fn main() {
    let shim = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let kernels = shim.join("../../kernels");
    let out = PathBuf::from(variable("OUT_DIR"));
    println!("cargo:rerun-if-env-changed=CXX");
    println!("cargo:rerun-if-changed={}", kernels.display());
    println!("cargo:rerun-if-changed=cuda_shim.h");
    println!("cargo:rerun-if-changed=launch.cpp");
    println!("cargo:rerun-if-changed=probe.cu");

    let source = out.join("kernels.cpp");
    fs::write(&source, translation_unit(&kernels)).expect("the build folder can be written");
    let compiler = env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let object = out.join("kernels.o");
    let mut compile = Command::new(&compiler);
    compile
        .args(FLAGS)
        .arg("-I")
        .arg(&shim)
        .arg("-I")
        .arg(&kernels);
    run(compile.arg("-c").arg(&source).arg("-o").arg(&object));

    let shared = out.join("libkitsune_kernels_shared.so");
    run(Command::new(&compiler)
        .arg("-shared")
        .arg(&object)
        .arg("-o")
        .arg(&shared));
    run(Command::new("ar")
        .arg("crs")
        .arg(out.join("libkitsune_kernels.a"))
        .arg(&object));
    println!("cargo:rustc-env=KITSUNE_SHIM_LIBRARY={}", shared.display());
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static=kitsune_kernels");
    link_standard_library(&compiler);
}

/// Statically where the compiler has the archive, so that test binaries run on machines without the library.
fn link_standard_library(compiler: &str) {
    let mut ask = Command::new(compiler);
    let answer = ask.arg("-print-file-name=libstdc++.a").output();
    let answer = answer.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    // A compiler that has none repeats the name.
    match answer.as_deref().map(Path::new) {
        Ok(archive) if archive.is_absolute() => {
            let folder = archive.parent().expect("an absolute path of a file");
            println!("cargo:rustc-link-search=native={}", folder.display());
            println!("cargo:rustc-link-lib=static:-bundle=stdc++");
        }
        _ => println!("cargo:rustc-link-lib=dylib=stdc++"),
    }
}

/// One unit with all kernels, as NVRTC is given them.
fn translation_unit(kernels: &Path) -> String {
    let mut names: Vec<_> = fs::read_dir(kernels)
        .expect("the kernels lie in kernels/")
        .map(|entry| {
            let name = entry.expect("the folder can be read").file_name();
            name.into_string().expect("names of kernels are ASCII")
        })
        .filter(|name| name.ends_with(".cu"))
        .collect();
    names.sort();
    let includes = names.iter().map(|name| format!("#include \"{name}\"\n"));
    format!(
        "#include \"cuda_shim.h\"\n{}#include \"probe.cu\"\n#include \"launch.cpp\"\n",
        includes.collect::<String>()
    )
}

fn variable(name: &str) -> String {
    env::var(name).expect("cargo sets it for build scripts")
}

fn run(command: &mut Command) {
    let status = command
        .status()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; the tests need a C++ compiler"));
    assert!(status.success(), "{command:?}: {status}");
}
