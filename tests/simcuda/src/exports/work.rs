//! Copies, fills, modules and kernels.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use super::{exports, put};
use crate::modules::{Launch, check_ptx, find_entry, gather};
use crate::sim::{CONTEXT, code};
use crate::streams::{HostFunction, Op, queue};

/// Threads of a block at most.
const THREADS_MAX: c_uint = 1024;

/// A text of the caller's that ends with zero.
fn text(start: *const c_char) -> Result<String, crate::sim::Code> {
    // SAFETY: the caller's text ends with zero.
    let text = unsafe { CStr::from_ptr(start) };
    text.to_str()
        .map(str::to_owned)
        .map_err(|_| code::INVALID_VALUE)
}

exports! {
    // Mapped memory is reached by the device that access was set for alone.
    fn cuMemcpyAsync(sim, dst: usize, src: usize, bytes: usize, stream: usize) {
        let device = sim.device()?;
        let is_near = |address| sim.pages.home(address).is_none_or(|home| home == device);
        if ![dst, src].into_iter().all(|end| sim.is_reachable(end, bytes) && is_near(end)) {
            return Err(code::INVALID_VALUE);
        }
        sim.push(queue(stream), Op::Copy { dst, src, bytes })
    }

    fn cuMemcpyPeerAsync(
        sim,
        dst: usize,
        dst_context: usize,
        src: usize,
        src_context: usize,
        bytes: usize,
        stream: usize
    ) {
        sim.device()?;
        for (end, context) in [(dst, dst_context), (src, src_context)] {
            let home = sim.memory.home(end).or_else(|| sim.pages.home(end));
            let is_there = home.is_some_and(|home| context == CONTEXT + home.unsigned_abs() as usize);
            if !is_there || !sim.is_reachable(end, bytes) {
                return Err(code::INVALID_VALUE);
            }
        }
        sim.push(queue(stream), Op::Copy { dst, src, bytes })
    }

    fn cuMemcpyDtoDAsync_v2(sim, dst: usize, src: usize, bytes: usize, stream: usize) {
        sim.device()?;
        sim.push(queue(stream), Op::Copy { dst, src, bytes })
    }

    // Pinned memory is read when the stream gets here, other memory at once, unless the device reaches that too.
    fn cuMemcpyHtoDAsync_v2(sim, dst: usize, src: *const u8, bytes: usize, stream: usize) {
        sim.device()?;
        if !sim.is_reachable(dst, bytes) {
            return Err(code::INVALID_VALUE);
        }
        let address = src.expose_provenance();
        if sim.memory.holds_pinned(address, bytes) {
            return sim.push(queue(stream), Op::Copy { dst, src: address, bytes });
        }
        if sim.config.pageable != 0 {
            return sim.push(queue(stream), Op::Late { dst, src: address, bytes });
        }
        // SAFETY: the caller has so many bytes there.
        let staged = unsafe { std::slice::from_raw_parts(src, bytes) }.into();
        sim.push(queue(stream), Op::Upload { dst, staged })
    }

    // Into ordinary memory the copy is over when the call returns.
    fn cuMemcpyDtoHAsync_v2(sim, dst: *mut u8, src: usize, bytes: usize, stream: usize) {
        sim.device()?;
        let address = dst.expose_provenance();
        let is_captured = sim.stream(queue(stream))?.capture.is_some();
        if sim.memory.holds_pinned(address, bytes) || is_captured {
            return sim.push(queue(stream), Op::Copy { dst: address, src, bytes });
        }
        sim.drain(queue(stream))?;
        if !sim.is_reachable(src, bytes) {
            return Err(code::INVALID_VALUE);
        }
        let src = std::ptr::with_exposed_provenance::<u8>(src);
        // SAFETY: the source is there, and the caller has so many bytes at `dst`.
        unsafe { dst.copy_from(src, bytes) };
        Ok(())
    }

    fn cuMemsetD8Async(sim, dst: usize, value: u8, bytes: usize, stream: usize) {
        sim.device()?;
        if !sim.is_reachable(dst, bytes) {
            return Err(code::INVALID_VALUE);
        }
        sim.push(queue(stream), Op::Fill { dst, value, bytes })
    }

    // On whichever thread makes the stream move on. Must not call the library, as with the real one.
    fn cuLaunchHostFunc(sim, stream: usize, function: HostFunction, data: usize) {
        sim.device()?;
        sim.push(queue(stream), Op::Call(function, data))
    }

    fn cuModuleLoadDataEx(
        sim,
        module: *mut usize,
        image: *const c_char,
        _count: c_uint,
        _options: *mut c_int,
        _values: *mut *mut c_void
    ) {
        sim.device()?;
        let image = text(image)?;
        check_ptx(&image, sim.config.version)?;
        let handle = sim.handle();
        sim.modules.insert(handle, image);
        put(module, handle)
    }

    fn cuModuleLoadData(sim, module: *mut usize, image: *const c_char) {
        sim.device()?;
        let image = text(image)?;
        check_ptx(&image, sim.config.version)?;
        let handle = sim.handle();
        sim.modules.insert(handle, image);
        put(module, handle)
    }

    fn cuModuleUnload(sim, module: usize) {
        sim.modules.remove(&module).map(drop).ok_or(code::INVALID_HANDLE)
    }

    fn cuModuleGetFunction(sim, function: *mut usize, module: usize, name: *const c_char) {
        let entry = find_entry(sim.modules.get(&module).ok_or(code::INVALID_HANDLE)?, &text(name)?)?;
        let handle = sim.handle();
        sim.functions.insert(handle, entry);
        put(function, handle)
    }

    fn cuFuncSetAttribute(sim, function: usize, _attribute: c_int, _value: c_int) {
        if sim.functions.contains_key(&function) { Ok(()) } else { Err(code::INVALID_HANDLE) }
    }

    fn cuLaunchKernel(
        sim,
        function: usize,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared: c_uint,
        stream: usize,
        parameters: *mut *mut u8,
        _extra: *mut *mut c_void
    ) {
        sim.device()?;
        let entry = sim.functions.get(&function).cloned().ok_or(code::INVALID_HANDLE)?;
        let is_flat = [grid_y, grid_z, block_y, block_z] == [1; 4];
        if !is_flat || grid_x == 0 || !(1..=THREADS_MAX).contains(&block_x) {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: the caller passes a place for each parameter, as long as the entry point says.
        let arguments = unsafe { gather(parameters.cast(), &entry.parameters) };
        let launch = Launch {
            entry: entry.name,
            blocks: grid_x,
            threads: block_x,
            shared,
            arguments,
        };
        sim.push(queue(stream), Op::Launch(launch))
    }
}
