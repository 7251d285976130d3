//! The exported functions, by their names and signatures in NVIDIA's header.
//!
//! Handles are numbers in the tables of the machine, as wide as the pointers they stand for. Places for answers
//! are trusted, as the real library trusts them.

#![allow(non_snake_case, reason = "the names are CUDA's")]

mod device;
mod memory;
mod streams;
mod work;

use crate::sim::Code;

/// Defines functions of the library: each enters the machine by `sim::enter`.
macro_rules! exports {
    ($(fn $name:ident($sim:ident $(, $argument:ident: $type:ty)*) $body:block)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "` of CUDA's driver API.")]
            ///
            /// # Safety
            /// As NVIDIA's documentation says.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> std::ffi::c_int {
                $crate::sim::enter(stringify!($name), |$sim: &mut $crate::sim::Sim| $body)
            }
        )*
    };
}
use exports;

/// Writes an answer.
fn put<T>(place: *mut T, value: T) -> Result<(), Code> {
    // SAFETY: whoever calls the library gives a place for the answer.
    unsafe { place.write(value) };
    Ok(())
}

/// Reads what a caller passed by address.
fn get<T: Copy>(place: *const T) -> T {
    // SAFETY: whoever calls the library gives a complete value there.
    unsafe { place.read() }
}
