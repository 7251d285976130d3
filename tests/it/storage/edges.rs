//! Tensors at their edges: empty ones, views of them, and gradients without elements.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{Optimizer, Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, Device, HostConfig, HostSchedule, Tensor};

fn context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
}

#[test]
fn views_of_empty_tensors_are_usable() {
    let context = context();
    let empty = Tensor::zeros(&context, [3, 0], DType::F32).unwrap();
    let view = empty.narrow(0, 2, 1).unwrap();
    view.fill(1.0).unwrap();
    assert!(view.to_vec::<f32>().unwrap().is_empty());
    assert!(view.duplicate().unwrap().is_empty());
    let huge = Tensor::zeros(&context, [usize::MAX, 0, usize::MAX], DType::F32).unwrap();
    let view = huge.narrow(0, 5, 3).unwrap().transpose(0, 2).unwrap();
    assert!(view.cast(DType::F16).unwrap().is_empty());
    assert!(view.contiguous().unwrap().is_empty());
    assert!(Tensor::zeros(&context, [usize::MAX / 2], DType::F32).is_err());
    assert!(Tensor::zeros(&context, [usize::MAX / 4], DType::F32).is_err());
}

#[test]
fn gradients_without_elements_are_stepped() {
    let context = context();
    let value = Tensor::zeros(&context, [4, 0], DType::F32).unwrap();
    let parameter = Parameter::new("empty", value).unwrap();
    let grad = Tensor::zeros(&context, [4, 0], DType::F16).unwrap();
    parameter.set_grad(grad).unwrap();
    let mut optimizer = Sgd::new(vec![parameter], SgdConfig::default()).unwrap();
    let mut scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
    let loss = Tensor::zeros(&context, [], DType::F32).unwrap();
    drop(scaler.scale(&loss).unwrap());
    let norm = scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
    assert_eq!(norm.item::<f64>().unwrap().to_bits(), 0);
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    scaler.update().unwrap();
    optimizer.zero_grad();
    assert_eq!(scaler.stats().unwrap().applied, 1);
}

#[test]
fn a_copy_is_ordered_before_its_source_is_freed_whatever_fails() {
    let inner = support::device::device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    let from = Context::new(&Device::from_driver(faults.clone())).unwrap();
    let to = Context::with_pool(from.pool()).unwrap();
    let source = Tensor::full(&from, [1024], DType::F32, 3.0).unwrap();
    // The first wait holds the copy back until the source is written, the second the source's stream.
    faults.fail_nth(Some("stream_wait"), 2);
    let copy = source.copy_to(&to).unwrap();
    assert_eq!(faults.disarm(), 0, "the fault fired");
    assert_eq!(faults.calls("synchronize_stream"), 1, "the host waited");
    assert_eq!(copy.to_vec::<f32>().unwrap(), [3.0; 1024]);
}

/// How one thread writes a tensor that another one reads.
type Write = fn(&Tensor, value: f32);

/// Reads and writes of two threads are work of one stream: each read shows one write as a whole, and no read shows an
/// earlier one than the read before.
#[test]
fn a_read_beside_the_writes_of_another_thread_shows_one_write_as_a_whole() {
    let writes: [Write; 3] = [
        |tensor, value| tensor.fill(f64::from(value)).unwrap(),
        |tensor, value| tensor.copy_from_slice(&vec![value; tensor.len()]).unwrap(),
        |tensor, value| {
            let other = Tensor::full(tensor.context(), tensor.shape(), DType::F32, value.into());
            tensor.copy_from(&other.unwrap()).unwrap();
        },
    ];
    let reads: [fn(&Tensor) -> Vec<f32>; 3] = [
        |tensor| tensor.to_vec().unwrap(),
        |tensor| tensor.to_host().unwrap().to_vec().unwrap(),
        |tensor| tensor.transpose(0, 1).unwrap().to_vec().unwrap(),
    ];
    for schedule in [HostSchedule::Threads, HostSchedule::Seeded(3)] {
        let config = HostConfig {
            schedule,
            ..HostConfig::default()
        };
        let context = Context::new(&support::device::device(config)).unwrap();
        for (write, read) in writes.iter().zip(reads) {
            let tensor = Tensor::zeros(&context, [64, 2048], DType::F32).unwrap();
            read_beside_writes(&tensor, *write, read);
        }
    }
}

fn read_beside_writes(tensor: &Tensor, write: Write, read: fn(&Tensor) -> Vec<f32>) {
    const READS: usize = 40;
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Relaxed: nothing else is published with the flag.
            for value in 1_u16.. {
                if is_over.load(Ordering::Relaxed) || value == u16::MAX {
                    break;
                }
                write(tensor, value.into());
                // The reader is not to wait for ever longer queues.
                if value % 8 == 0 {
                    tensor.context().synchronize().unwrap();
                }
            }
        });
        let mut last = 0.0;
        for _ in 0..READS {
            let values = read(tensor);
            let first = values[0];
            let torn = values.iter().position(|value| *value != first);
            if torn.is_some() || first < last {
                is_over.store(true, Ordering::Relaxed);
                panic!("after {last}: {first}, and something else from {torn:?} on");
            }
            last = first;
        }
        is_over.store(true, Ordering::Relaxed);
    });
}
