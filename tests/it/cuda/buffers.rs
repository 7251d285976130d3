//! Buffers used through cudarc: launches and copies on the simulated driver, on one stream and on several; and
//! that every call of cudarc's that takes device memory takes a buffer.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests launch kernels, and fail by panicking"
)]

use std::sync::Arc;
use std::thread;

use crate::support::cuda::Sim;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaStream, DevicePtr, DeviceSlice, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use cudarc::{cublas, cublaslt, nccl};
use kitsune::driver::cuda::{borrow_stream, share_stream};
use kitsune::storage::DeviceBuffer;
use kitsune::{Context, DType, Device, Error, Pool, PoolConfig, Tensor, f16};

/// An entry point that the library of kernels has, with its struct's fields as parameters.
const FILL: &str = ".version 8.0\n.target sm_80\n.visible .entry fill_f32(.param .u64 dst, .param .u64 len, \
                    .param .f64 value)\n{\nret;\n}\n";

struct Bench {
    device: Device,
    pool: Pool,
    cuda: Arc<CudaContext>,
    home: Arc<CudaStream>,
    context: Context,
    /// Last: the others call the driver when they go, which is another test's after that.
    sim: Sim,
}

impl Bench {
    fn new() -> Self {
        let (sim, device) = Sim::device();
        sim.set("shim", kitsune_shim::LIBRARY);
        let pool = Pool::new(&device, PoolConfig::default()).unwrap();
        let cuda = CudaContext::new(0).unwrap();
        let home = cuda.new_stream().unwrap();
        let context = Context::on_cuda_stream(&pool, &home).unwrap();
        Self {
            sim,
            device,
            pool,
            cuda,
            home,
            context,
        }
    }

    fn buffer(&self, values: &[f32]) -> DeviceBuffer<f32> {
        let mut buffer = DeviceBuffer::uninit(&self.context, values.len()).unwrap();
        self.home.memcpy_htod(values, &mut buffer).unwrap();
        buffer
    }

    fn fill(&self) -> CudaFunction {
        let module = self.cuda.load_module(Ptx::from_src(FILL)).unwrap();
        module.load_function("fill_f32").unwrap()
    }
}

fn launch(stream: &CudaStream, fill: &CudaFunction, buffer: &mut DeviceBuffer<f32>, value: f64) {
    let len = buffer.len();
    let config = LaunchConfig::for_num_elems(u32::try_from(len).unwrap());
    let mut builder = stream.launch_builder(fill);
    let buffer = buffer.on_mut(stream);
    // SAFETY: the kernel takes an address, a length and a value.
    unsafe { builder.arg(&buffer).arg(&len).arg(&value).launch(config) }.unwrap();
}

#[test]
fn a_kernel_is_launched_on_a_buffer() {
    let bench = Bench::new();
    let mut buffer = DeviceBuffer::<f32>::zeros(&bench.context, 1000).unwrap();
    assert_eq!(buffer.len(), 1000);
    assert_eq!(buffer.num_bytes(), 4000);
    launch(&bench.home, &bench.fill(), &mut buffer, 2.5);
    assert_eq!(bench.home.clone_dtoh(&buffer).unwrap(), vec![2.5; 1000]);
    let tensor = buffer.into_tensor([10, 100]).unwrap();
    assert_eq!(tensor.to_vec::<f32>().unwrap(), vec![2.5; 1000]);
}

#[test]
fn copies_go_in_every_direction() {
    let bench = Bench::new();
    let a = bench.buffer(&[1.0, 2.0, 3.0]);
    let mut b = DeviceBuffer::<f32>::zeros(&bench.context, 3).unwrap();
    bench.home.memcpy_dtod(&a, &mut b).unwrap();
    assert_eq!(bench.home.clone_dtoh(&b).unwrap(), [1.0, 2.0, 3.0]);
    bench.home.memset_zeros(&mut b).unwrap();
    let mut seen = [9.0; 3];
    bench.home.memcpy_dtoh(&b, &mut seen).unwrap();
    bench.home.synchronize().unwrap();
    assert_eq!(seen, [0.0; 3]);
}

#[test]
fn home_alone_records_no_event() {
    let bench = Bench::new();
    let mut a = bench.buffer(&[1.0; 100]);
    let before = bench.sim.log();
    bench.home.memset_zeros(&mut a).unwrap();
    bench.home.clone_dtoh(&a).unwrap();
    drop(a);
    let calls = bench.sim.names_since(&before);
    assert!(
        calls.iter().all(|name| !name.contains("Event")),
        "{calls:?}"
    );
}

#[test]
fn uses_on_several_streams_are_ordered_by_themselves() {
    let bench = Bench::new();
    let fill = bench.fill();
    let [one, two] = [(); 2].map(|()| bench.cuda.new_stream().unwrap());
    // Streams of the simulation run only when they are waited for, so what is not ordered shows.
    let mut a = bench.buffer(&[1.0; 64]);
    let mut b = DeviceBuffer::<f32>::zeros(&bench.context, 64).unwrap();
    one.memcpy_dtod(&a, &mut b).unwrap();
    assert_eq!(
        two.clone_dtoh(&b).unwrap(),
        [1.0; 64],
        "written on one stream, read on two"
    );
    launch(&two, &fill, &mut a, 3.0);
    one.memcpy_dtod(&a, &mut b).unwrap();
    launch(&bench.home, &fill, &mut a, 4.0);
    assert_eq!(
        bench.home.clone_dtoh(&b).unwrap(),
        [3.0; 64],
        "home waits for what it reads"
    );
    launch(&one, &fill, &mut b, 5.0);
    let tensor = b.into_tensor([64]).unwrap();
    assert_eq!(tensor.to_vec::<f32>().unwrap(), [5.0; 64]);
}

#[test]
fn memory_waits_for_every_stream_that_still_reads_it_and_home_does_not() {
    let bench = Bench::new();
    let mut readers = Vec::new();
    let a = bench.buffer(&[7.0; 1024]);
    let address = a.buffer().ptr();
    for _ in 0..3 {
        let stream = bench.cuda.new_stream().unwrap();
        let mut copy = DeviceBuffer::<f32>::uninit(&bench.context, 1024).unwrap();
        stream.memcpy_dtod(&a, &mut copy).unwrap();
        readers.push((stream, copy));
    }
    let before = bench.sim.log();
    drop(a);
    let calls = bench.sim.names_since(&before);
    let waits = calls.iter().filter(|name| *name == "cuStreamWaitEvent");
    assert_eq!(waits.count(), 3, "{calls:?}");
    assert!(
        calls.iter().all(|name| !name.contains("Synchronize")),
        "{calls:?}"
    );
    // Overwritten through home, which waits for nobody: it must get other memory.
    let other = bench.buffer(&[0.0; 1024]);
    assert_ne!(other.buffer().ptr(), address);
    bench.home.synchronize().unwrap();
    for (stream, copy) in &readers {
        assert_eq!(stream.clone_dtoh(copy).unwrap(), [7.0; 1024]);
    }
}

#[test]
fn a_stream_of_use_may_be_gone_before_the_buffer() {
    let bench = Bench::new();
    let a = bench.buffer(&[7.0; 256]);
    let mut copy = DeviceBuffer::<f32>::uninit(&bench.context, 256).unwrap();
    let stream = bench.cuda.new_stream().unwrap();
    stream.memcpy_dtod(&a, &mut copy).unwrap();
    drop(stream);
    drop(a);
    assert_eq!(bench.home.clone_dtoh(&copy).unwrap(), [7.0; 256]);
    assert_eq!(
        bench
            .sim
            .log()
            .lines()
            .filter(|line| line.ends_with(" 400"))
            .count(),
        0
    );
}

#[test]
fn each_thread_has_a_default_stream_of_its_own() {
    let bench = Bench::new();
    let per_thread = bench.cuda.per_thread_stream();
    let a = bench.buffer(&[7.0; 256]);
    let address = a.buffer().ptr();
    let mut copies = [(); 2].map(|()| DeviceBuffer::<f32>::uninit(&bench.context, 256).unwrap());
    for copy in &mut copies {
        thread::scope(|scope| {
            scope.spawn(|| per_thread.memcpy_dtod(&a, copy).unwrap());
        });
    }
    let before = bench.sim.log();
    drop(a);
    let waits = bench.sim.names_since(&before);
    assert_eq!(
        waits
            .iter()
            .filter(|name| *name == "cuStreamWaitEvent")
            .count(),
        2
    );
    assert_ne!(bench.buffer(&[0.0; 256]).buffer().ptr(), address);
    for copy in &copies {
        assert_eq!(bench.home.clone_dtoh(copy).unwrap(), [7.0; 256]);
    }
    let refused = share_stream(&bench.device, &per_thread)
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("a different stream on each thread"),
        "{refused}"
    );
}

#[test]
fn without_tracking_nothing_is_added() {
    let bench = Bench::new();
    let mut a = bench.buffer(&[7.0; 256]);
    let side = bench.cuda.new_stream().unwrap();
    // SAFETY: the test waits for the streams itself.
    unsafe { bench.cuda.disable_event_tracking() };
    let before = bench.sim.log();
    side.memset_zeros(&mut a).unwrap();
    let calls = bench.sim.names_since(&before);
    assert!(
        calls.iter().all(|name| !name.contains("Event")),
        "{calls:?}"
    );
    side.synchronize().unwrap();
}

#[test]
fn a_shared_stream_outlives_its_owner_while_blocks_are_out() {
    let bench = Bench::new();
    let owner = bench.cuda.new_stream().unwrap();
    let stream = share_stream(&bench.device, &owner).unwrap();
    let before = bench.sim.calls("cuStreamDestroy_v2");
    let blocks: Vec<_> = (0..4)
        .map(|_| bench.pool.allocate(3 << 20, &stream).unwrap())
        .collect();
    drop((owner, stream));
    drop(blocks);
    assert_eq!(
        bench.sim.calls("cuStreamDestroy_v2"),
        before,
        "the pool remembers the stream"
    );
    // Memory freed on it can be had by others, behind a fence.
    let other = bench.device.create_stream().unwrap();
    drop(bench.pool.allocate(12 << 20, &other).unwrap());
    drop((bench.context, bench.home, other, bench.pool));
    assert!(
        bench.sim.calls("cuStreamDestroy_v2") > before,
        "with the pool, the stream goes"
    );
    assert_eq!(
        bench
            .sim
            .log()
            .lines()
            .filter(|line| line.ends_with(" 400"))
            .count(),
        0
    );
}

#[test]
fn the_legacy_default_stream_runs_in_order_with_blocking_streams_only() {
    let bench = Bench::new();
    // SAFETY: lives until the test ends.
    let blocking =
        cudarc::driver::result::stream::create(cudarc::driver::result::stream::StreamKind::Default)
            .unwrap();
    let legacy = bench.cuda.default_stream();
    // SAFETY: as above.
    let blocking = unsafe { borrow_stream(&bench.device, blocking) }.unwrap();
    let names = [0, 1].map(std::ptr::without_provenance_mut);
    // SAFETY: the default stream lives as long as its context.
    let names = names.map(|name| unsafe { borrow_stream(&bench.device, name) }.unwrap());
    let context = Context::on_stream(&bench.pool, &blocking).unwrap();
    let ones = kitsune::Tensor::full(&context, [4], kitsune::DType::F32, 1.0).unwrap();
    let mut seen = [0.0_f32; 4];
    let home = Context::on_cuda_stream(&bench.pool, &legacy).unwrap();
    let buffer = DeviceBuffer::<f32>::zeros(&home, 4).unwrap();
    assert!(
        !names[0].is_idle().unwrap() && !names[1].is_idle().unwrap(),
        "two names of one stream"
    );
    legacy.memcpy_dtoh(&buffer, &mut seen).unwrap();
    assert!(
        blocking.is_idle().unwrap(),
        "the legacy stream ran behind it"
    );
    assert_eq!(ones.to_vec::<f32>().unwrap(), [1.0; 4]);

    let apart = Context::on_cuda_stream(&bench.pool, &bench.home).unwrap();
    let _late = DeviceBuffer::<f32>::zeros(&apart, 4).unwrap();
    legacy.memcpy_dtoh(&buffer, &mut seen).unwrap();
    assert!(
        !apart.stream().is_idle().unwrap(),
        "non-blocking streams are not ordered with it"
    );
}

#[test]
fn parts_are_used_as_the_whole_is() {
    let bench = Bench::new();
    let fill = bench.fill();
    let mut a = bench.buffer(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let mut b = DeviceBuffer::<f32>::zeros(&bench.context, 4).unwrap();
    let source = a.slice(1..).unwrap().slice(1..=2).unwrap();
    let mut target = b.slice_mut(1..3).unwrap();
    assert_eq!((source.len(), target.num_bytes()), (2, 8));
    bench.home.memcpy_dtod(&source, &mut target).unwrap();
    assert_eq!(bench.home.clone_dtoh(&b).unwrap(), [0.0, 2.0, 3.0, 0.0]);
    let mut part = a.slice_mut(4..).unwrap();
    let mut last = part.slice_mut(1..).unwrap();
    let (guard, len) = (last.on_mut(&bench.home), 1_u64);
    let config = LaunchConfig::for_num_elems(1);
    let mut builder = bench.home.launch_builder(&fill);
    // SAFETY: the kernel takes an address, a length and a value.
    unsafe { builder.arg(&guard).arg(&len).arg(&9.0_f64).launch(config) }.unwrap();
    drop(guard);
    bench
        .home
        .memset_zeros(&mut part.slice_mut(..1).unwrap())
        .unwrap();
    assert_eq!(
        bench.home.clone_dtoh(&a).unwrap(),
        [0.0, 1.0, 2.0, 3.0, 0.0, 9.0]
    );
    assert!(a.slice(4..7).is_none() && a.slice_mut(7..).is_none() && a.split_at_mut(7).is_none());
    assert!(a.slice(6..).unwrap().is_empty());
}

/// How many waits for events `act` enqueues.
fn waits(sim: &Sim, act: impl FnOnce()) -> usize {
    let before = sim.log();
    act();
    let calls = sim.names_since(&before);
    let waits = calls.iter().filter(|name| *name == "cuStreamWaitEvent");
    waits.count()
}

#[test]
fn parts_apart_do_not_wait_for_each_other_and_what_overlaps_does() {
    let bench = Bench::new();
    let mut a = bench.buffer(&[1.0; 64]);
    let [one, two] = [(); 2].map(|()| bench.cuda.new_stream().unwrap());
    let (mut left, mut right) = a.split_at_mut(32).unwrap();
    // Both learn of home and of themselves once.
    let first = waits(&bench.sim, || one.memset_zeros(&mut left).unwrap());
    let second = waits(&bench.sim, || two.memset_zeros(&mut right).unwrap());
    assert_eq!(
        first, second,
        "two has nothing to wait for that one had not"
    );
    let across = waits(&bench.sim, || two.memset_zeros(&mut a).unwrap());
    assert_eq!(across, second + 2, "the end on one, and its own");
    // Waits for the stream that wrote the part, which runs the rest before.
    assert_eq!(
        bench.home.clone_dtoh(&a.slice(60..).unwrap()).unwrap(),
        [0.0; 4]
    );
    // The memory is not had before the use of a part is over.
    let address = a.buffer().ptr();
    let mut copy = DeviceBuffer::<f32>::uninit(&bench.context, 4).unwrap();
    bench.home.memcpy_htod(&[7.0; 64], &mut a).unwrap();
    one.memcpy_dtod(&a.slice(8..12).unwrap(), &mut copy)
        .unwrap();
    drop(a);
    let other = bench.buffer(&[0.0; 64]);
    assert_ne!(other.buffer().ptr(), address);
    bench.home.synchronize().unwrap();
    assert_eq!(one.clone_dtoh(&copy).unwrap(), [7.0; 4]);
}

#[test]
fn tensors_become_buffers_and_buffers_tensors_without_a_copy() {
    let bench = Bench::new();
    let tensor = Tensor::full(&bench.context, [2, 8], DType::F32, 3.0).unwrap();
    let address = tensor.ptr();
    let mut buffer = DeviceBuffer::<f32>::from_tensor(tensor).unwrap();
    assert_eq!((buffer.buffer().ptr(), buffer.len()), (address, 16));
    assert_eq!(bench.home.clone_dtoh(&buffer).unwrap(), [3.0; 16]);
    let side = bench.cuda.new_stream().unwrap();
    side.memset_zeros(&mut buffer.slice_mut(8..).unwrap())
        .unwrap();
    let tensor = buffer.into_tensor([4, 4]).unwrap();
    assert_eq!(tensor.ptr(), address);
    assert_eq!(
        tensor.to_vec::<f32>().unwrap(),
        [[3.0; 8], [0.0; 8]].concat()
    );

    let refused = |tensor: Tensor| {
        let refused = DeviceBuffer::<f32>::from_tensor(tensor).unwrap_err();
        assert!(
            matches!(refused, Error::InvalidArgument { .. }),
            "{refused}"
        );
        refused.to_string()
    };
    let clone = tensor.clone();
    assert!(refused(clone).contains("shares the memory"));
    assert!(refused(tensor.narrow(0, 1, 2).unwrap()).contains("first element"));
    assert!(refused(tensor.transpose(0, 1).unwrap()).contains("first element"));
    assert!(refused(tensor.cast(DType::F16).unwrap()).contains("f16, not f32"));
    let plain = Context::with_pool(&bench.pool).unwrap();
    let elsewhere = Tensor::zeros(&plain, [4], DType::F32).unwrap();
    assert!(refused(elsewhere).contains("Context::on_cuda_stream"));
    // The first rows are the first elements, once nobody else has them.
    let rows = tensor.narrow(0, 0, 2).unwrap();
    drop(tensor);
    let rows = DeviceBuffer::<f32>::from_tensor(rows).unwrap();
    assert_eq!(bench.home.clone_dtoh(&rows).unwrap(), [3.0; 8]);
}

#[test]
fn what_cannot_be_is_refused() {
    let bench = Bench::new();
    let plain = Context::with_pool(&bench.pool).unwrap();
    let refused = DeviceBuffer::<u8>::uninit(&plain, 1).unwrap_err();
    assert!(
        refused.to_string().contains("Context::on_cuda_stream"),
        "{refused}"
    );
    let refused = DeviceBuffer::<f32>::uninit(&bench.context, usize::MAX);
    assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    let refused = bench.buffer(&[1.0; 6]).into_tensor([4]);
    assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    let host = Device::host(kitsune::HostConfig::default()).unwrap();
    let pool = Pool::new(&host, PoolConfig::default()).unwrap();
    assert!(Context::on_cuda_stream(&pool, &bench.home).is_err());
    let empty = DeviceBuffer::<f32>::zeros(&bench.context, 0).unwrap();
    assert_eq!(empty.device_ptr(&bench.home).0, 0);
    assert!(empty.is_empty());
}

/// Compiled, and not run: the libraries are not here.
#[allow(dead_code, reason = "compiling it is the test")]
fn every_library_takes_a_buffer(
    blas: &cublas::CudaBlas,
    lt: &cublaslt::CudaBlasLT,
    comm: &nccl::Comm,
    [a, b]: [&DeviceBuffer<f16>; 2],
    out: &mut DeviceBuffer<f16>,
) -> Result<(), Box<dyn std::error::Error>> {
    use cublas::{Gemm, GemmConfig};
    use cublaslt::{Matmul, MatmulConfig};
    let none = cublas::sys::cublasOperation_t::CUBLAS_OP_N;
    let config = GemmConfig {
        transa: none,
        transb: none,
        m: 2,
        n: 2,
        k: 2,
        alpha: f16::ONE,
        lda: 2,
        ldb: 2,
        beta: f16::ZERO,
        ldc: 2,
    };
    // SAFETY: four elements each.
    unsafe { blas.gemm(config, a, b, out) }?;
    let config = MatmulConfig {
        transa: false,
        transb: false,
        transc: false,
        m: 2,
        n: 2,
        k: 2,
        alpha: 1.0,
        lda: 2,
        ldb: 2,
        beta: 0.0,
        ldc: 2,
        stride_a: None,
        stride_b: None,
        stride_c: None,
        stride_bias: None,
        batch_size: None,
    };
    // SAFETY: four elements each.
    unsafe { Matmul::<f16>::matmul(lt, config, a, b, out, None, None) }?;
    comm.all_reduce(a, out, &nccl::ReduceOp::Sum)
        .map_err(|error| format!("{error:?}"))?;
    comm.broadcast(Some(a), out, 0)
        .map_err(|error| format!("{error:?}"))?;
    let part = a.slice(..4).ok_or("four elements each")?;
    let mut place = out.slice_mut(..4).ok_or("four elements each")?;
    // SAFETY: as above.
    unsafe { Matmul::<f16>::matmul(lt, config, &part, &part, &mut place, None, None) }?;
    comm.all_reduce(&part, &mut place, &nccl::ReduceOp::Sum)
        .map_err(|error| format!("{error:?}"))?;
    Ok(())
}
