//! What driver calls cost on this machine: the figures that the pool's policy and its fences rest on.

use kitsune::driver::cuda::stream_handle;
use kitsune::units::{KIB, MIB, to_usize};
use kitsune::{Context, DType, Result, Stream, Tensor};
use serde_json::json;

use crate::clock::{host_time, median, repeat};
use crate::cuda::{Handle, call};
use crate::setting::Setting;

pub(crate) fn run(setting: &Setting) -> Result<()> {
    for (name, bytes) in [
        ("2MiB", 2 * MIB),
        ("32MiB", 32 * MIB),
        ("512MiB", 512 * MIB),
    ] {
        pages(setting, name, to_usize(bytes))?;
    }
    stitching(setting)?;
    events(setting)?;
    launches(setting)
}

/// A page of its own, mapped, and mapped a second time while the first mapping stays: each call by itself.
fn pages(setting: &Setting, name: &str, bytes: usize) -> Result<()> {
    let cuda = &setting.cuda;
    let range = cuda.reserve(2 * bytes)?;
    let alias = range + bytes as u64;
    let laps = repeat(|| {
        let (created, page) = timed(|| cuda.create_page(bytes))?;
        let (mapped, ()) = timed(|| cuda.map(range, bytes, page))?;
        let (opened, ()) = timed(|| cuda.set_access(range, bytes))?;
        let (aliased, ()) = timed(|| cuda.map(alias, bytes, page))?;
        let (alias_opened, ()) = timed(|| cuda.set_access(alias, bytes))?;
        let (unmapped, ()) = timed(|| cuda.unmap(alias, bytes))?;
        cuda.unmap(range, bytes)?;
        let (released, ()) = timed(|| cuda.release_page(page))?;
        Ok([
            created,
            mapped,
            opened,
            aliased,
            alias_opened,
            unmapped,
            released,
        ])
    })?;
    cuda.release(range, 2 * bytes)?;
    let names = [
        "create_page",
        "map",
        "set_access",
        "map_alias",
        "set_access_alias",
        "unmap",
        "release_page",
    ];
    for (number, call) in names.into_iter().enumerate() {
        let time = median(laps.iter().map(|lap| lap[number]).collect());
        setting.tell("costs", &format!("{call}/{name}"), json!({ "us": time }));
    }
    Ok(())
}

/// Many pages of 2 MiB side by side, with access set once: what a stitched request asks for.
fn stitching(setting: &Setting) -> Result<()> {
    const PAGE: u64 = 2 * MIB;
    let driver = setting.device.driver();
    for count in [1, 16, 128] {
        let bytes = count * PAGE;
        let range = driver.reserve(bytes)?;
        let pages = (0..count)
            .map(|_| driver.create_page(PAGE))
            .collect::<Result<Vec<_>>>()?;
        let laps = repeat(|| {
            let (mapped, ()) = timed(|| driver.map(range, &pages))?;
            let unmap = || {
                // SAFETY: no work was enqueued on the range.
                unsafe { driver.unmap(range, bytes) }
            };
            let (unmapped, ()) = timed(unmap)?;
            Ok([mapped, unmapped])
        })?;
        pages
            .into_iter()
            .try_for_each(|page| driver.destroy_page(page))?;
        driver.release(range, bytes)?;
        let [mapped, unmapped] =
            [0, 1].map(|number| median(laps.iter().map(|lap| lap[number]).collect()));
        let figures = json!({ "us": mapped, "unmap_us": unmapped });
        setting.tell("costs", &format!("stitch/{count}_pages"), figures);
    }
    Ok(())
}

/// Events as fences use them, on streams without other work.
fn events(setting: &Setting) -> Result<()> {
    const COUNT: u32 = 200;
    let cuda = &setting.cuda;
    let [one, two] = [
        setting.device.create_stream()?,
        setting.device.create_stream()?,
    ];
    let (handle, other): (Handle, Handle) =
        (stream_handle(&one)?.cast(), stream_handle(&two)?.cast());
    let event = cuda.event()?;
    let settle = || {
        one.synchronize()?;
        two.synchronize()
    };
    let tell = |name: &str, time: f64| setting.tell("costs", name, json!({ "us": time / 1e3 }));
    // SAFETY: event and stream are alive.
    let record = || unsafe { call!(cuda, cuEventRecord(event, handle)) };
    tell("event_record", host_time(COUNT, record, settle)?);
    // SAFETY: as above.
    let wait = || unsafe { call!(cuda, cuStreamWaitEvent(other, event, 0)) };
    tell("stream_wait", host_time(COUNT, wait, settle)?);
    // SAFETY: as above; the event is complete.
    let query = || unsafe { call!(cuda, cuEventQuery(event)) };
    tell("event_query_complete", host_time(COUNT, query, settle)?);
    let make = || cuda.destroy(cuda.event()?);
    tell("event_create_destroy", host_time(COUNT, make, settle)?);
    tell(
        "stream_synchronize_idle",
        host_time(COUNT, settle, || Ok(()))? / 2.0,
    );
    cuda.destroy(event)
}

/// Small kernels one by one, and the same ones as a graph.
fn launches(setting: &Setting) -> Result<()> {
    const COUNT: u32 = 200;
    let context: Context = setting.context()?;
    let stream: &Stream = context.stream();
    let tensor = Tensor::full(&context, [to_usize(KIB)], DType::F32, 1.0)?;
    let launch = || tensor.fill(2.0);
    let time = host_time(COUNT, launch, || stream.synchronize())?;
    setting.tell("costs", "launch", json!({ "us": time / 1e3 }));
    let graph = stream.capture(|| (0..COUNT).try_for_each(|_| launch()))?;
    let replay = || {
        // SAFETY: the tensor lives until the stream was waited for, and nobody else uses it.
        unsafe { graph.launch(stream) }
    };
    let whole = host_time(
        1,
        || replay().and_then(|()| stream.synchronize()),
        || Ok(()),
    )?;
    let figures = json!({ "us": whole / 1e3, "kernels": COUNT });
    setting.tell("costs", "graph_of_launches_until_done", figures);
    Ok(())
}

/// Microseconds of the host for one call, with what it gave.
fn timed<T>(call: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let start = std::time::Instant::now();
    let given = call()?;
    Ok((start.elapsed().as_secs_f64() * 1e6, given))
}
