//! Gives the library the name under which a CUDA driver is looked for: whoever loads it by its path first
//! makes the system answer later requests for `libcuda.so` with it.

fn main() {
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    }
    println!("cargo:rerun-if-changed=build.rs");
}
