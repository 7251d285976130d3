//! Streams, events, captures and graphs.

use std::ffi::{c_int, c_uint, c_ulonglong};
use std::sync::Arc;

use super::{exports, put};
use crate::sim::code;
use crate::streams::{Event, Op, Stream, queue};

/// A flag of streams that are not ordered with the legacy default stream.
const NON_BLOCKING: c_uint = 1;

exports! {
    fn cuStreamCreate(sim, stream: *mut usize, flags: c_uint) {
        sim.device()?;
        let handle = sim.handle();
        sim.streams.insert(handle, Stream::new(flags & NON_BLOCKING == 0));
        put(stream, handle)
    }

    fn cuStreamDestroy_v2(sim, stream: usize) {
        sim.stream(queue(stream))?.is_destroyed = true;
        if let Some(capture) = sim.capture_from(stream) {
            sim.drop_capture(capture);
        }
        Ok(())
    }

    fn cuStreamSynchronize(sim, stream: usize) {
        sim.device()?;
        sim.check_waitable(queue(stream))?;
        sim.drain(queue(stream))
    }

    fn cuStreamQuery(sim, stream: usize) {
        sim.device()?;
        sim.check_waitable(queue(stream))?;
        if sim.stream(queue(stream))?.is_idle() {
            return Ok(());
        }
        sim.step(queue(stream))?;
        Err(code::NOT_READY)
    }

    fn cuStreamWaitEvent(sim, stream: usize, event: usize, _flags: c_uint) {
        sim.device()?;
        sim.wait(queue(stream), event)
    }

    fn cuStreamBeginCapture_v2(sim, stream: usize, _mode: c_int) {
        sim.device()?;
        sim.begin_capture(queue(stream))
    }

    fn cuStreamEndCapture(sim, stream: usize, graph: *mut usize) {
        sim.device()?;
        put(graph, 0)?;
        let handle = sim.end_capture(queue(stream))?;
        put(graph, handle)
    }

    fn cuStreamIsCapturing(sim, stream: usize, status: *mut c_int) {
        let capture = sim.stream(queue(stream))?.capture;
        let answer = capture.map_or(0, |capture| sim.capture(capture).status());
        put(status, answer)
    }

    fn cuEventCreate(sim, event: *mut usize, _flags: c_uint) {
        sim.device()?;
        let handle = sim.handle();
        sim.events.insert(handle, Event::default());
        put(event, handle)
    }

    fn cuEventDestroy_v2(sim, event: usize) {
        sim.events.remove(&event).map(drop).ok_or(code::INVALID_HANDLE)
    }

    fn cuEventRecord(sim, event: usize, stream: usize) {
        sim.device()?;
        sim.record(event, queue(stream))
    }

    fn cuEventQuery(sim, event: usize) {
        let Some(mark) = sim.askable(event)?.filter(|mark| !mark.is_passed()) else {
            return Ok(());
        };
        sim.step(mark.stream())?;
        Err(code::NOT_READY)
    }

    fn cuEventSynchronize(sim, event: usize) {
        match sim.askable(event)? {
            None => Ok(()),
            Some(mark) => sim.pass(&mark),
        }
    }

    // In milliseconds of the host's clock.
    fn cuEventElapsedTime(sim, milliseconds: *mut f32, start: usize, end: usize) {
        let mut passed_at = |event| {
            let mark = sim.askable(event)?.ok_or(code::INVALID_HANDLE)?;
            mark.passed_at().ok_or(code::NOT_READY)
        };
        let (start, end) = (passed_at(start)?, passed_at(end)?);
        put(milliseconds, (end - start).as_secs_f32() * 1e3)
    }

    fn cuGraphInstantiateWithFlags(sim, executable: *mut usize, graph: usize, _flags: c_ulonglong) {
        let ops = sim.graphs.get(&graph).map(Arc::clone).ok_or(code::INVALID_HANDLE)?;
        let handle = sim.handle();
        sim.executables.insert(handle, ops);
        put(executable, handle)
    }

    fn cuGraphLaunch(sim, executable: usize, stream: usize) {
        sim.device()?;
        let ops = sim.executables.get(&executable).map(Arc::clone).ok_or(code::INVALID_HANDLE)?;
        sim.push(queue(stream), Op::Graph(ops))
    }

    fn cuGraphExecDestroy(sim, executable: usize) {
        sim.executables.remove(&executable).map(drop).ok_or(code::INVALID_HANDLE)
    }

    fn cuGraphDestroy(sim, graph: usize) {
        sim.graphs.remove(&graph).map(drop).ok_or(code::INVALID_HANDLE)
    }
}
