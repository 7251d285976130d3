//! Links the plug-in against the harness's stand-in for CUDA.

fn main() {
    println!("cargo:rerun-if-env-changed=B");
    let Ok(folder) = std::env::var("B") else {
        panic!("set B to the folder with the harness's libcudart.so.13");
    };
    println!("cargo:rustc-link-arg=-L{folder}");
    println!("cargo:rustc-link-arg=-l:libcudart.so.13");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
}
