//! Device code and its arguments, as one value.

use std::fmt::Debug;

/// A kernel with its arguments: what [`Driver::launch`](super::Driver::launch) enqueues.
///
/// One struct per kernel holds the arguments as plain numbers and addresses. The host driver calls
/// [`run`](Self::run), the twin; a driver with a device of its own looks [`entry`](Self::entry) up in its
/// code and passes the struct's fields. Both therefore compute from the same arguments. A captured kernel
/// is run once per replay, so `run` takes `&self`.
pub trait Kernel: Debug + Send + Sync {
    /// Name of the entry point: `<op>_<dtype>`, or `<op>` where one body serves every type.
    fn entry(&self) -> &'static str;

    /// Elements the kernel works on, from which a device derives its launch shape.
    fn elements(&self) -> u64;

    /// Computes the kernel on the host, on the calling thread and the workers of the rayon pool.
    ///
    /// # Safety
    /// Every address in the arguments is valid for the element type and count that the arguments give,
    /// memory that is written is not accessed by anything else meanwhile, and memory that is read is not
    /// written by anything else.
    unsafe fn run(&self);
}
