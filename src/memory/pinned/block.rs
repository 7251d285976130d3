//! A block of pinned memory in a caller's hands.
//!
//! The host may look at the bytes only while no stream uses them. A *use* is work enqueued on a stream that
//! reads or writes the block; whoever enqueues it says so with [`PinnedBlock::record_use`], which marks the
//! stream's end at that moment. What gives the bytes out waits for all marks first.

#![allow(
    unsafe_code,
    reason = "owning the area, with all its uses passed, is what makes its bytes a slice"
)]

use std::fmt;
use std::slice;
use std::sync::Arc;

use super::Shared;
use super::cache::{Area, Use, Uses, have_passed};
use crate::driver::{DevicePtr, Event, Stream};
use crate::error::{Error, Result};
use crate::units::to_usize;

/// Pinned host memory, owned. Dropping it gives it back to its pool from any thread; it is handed out again when the
/// streams that use it have passed the uses recorded. The drop waits for no stream, unless it is the last thing that
/// keeps its pool, as [there](super::PinnedPool#dropping) is said.
///
/// # Examples
/// ```
/// use kitsune::memory::PinnedPool;
/// use kitsune::{Context, DType, Device, HostConfig, Tensor};
///
/// let device = Device::host(HostConfig::default())?;
/// let pinned = PinnedPool::new(&device);
/// let context = Context::new(&device)?;
/// let tensor = Tensor::zeros(&context, [4], DType::F32)?;
///
/// let mut staging = pinned.allocate(16)?;
/// staging.as_mut_slice()?.fill(0);
/// staging.as_mut_slice()?[3] = 0x3f; // The top byte of 0.5 as f32.
/// tensor.copy_from_pinned(&mut staging)?;
/// // The host goes on at once; looking at the bytes again would wait.
/// drop(staging);
/// assert_eq!(tensor.to_vec::<f32>()?, [0.5, 0.0, 0.0, 0.0]);
/// # Ok::<(), kitsune::Error>(())
/// ```
pub struct PinnedBlock {
    pool: Arc<Shared>,
    /// `None` for a block of zero bytes; taken on drop.
    area: Option<Area>,
    bytes: u64,
    /// At most one for each stream: a later use comes after the earlier ones.
    uses: Uses,
    /// Whether a use could be neither marked nor waited for. Then the memory may be in use for ever.
    is_lost: bool,
}

impl PinnedBlock {
    pub(super) fn new(pool: Arc<Shared>, area: Option<Area>, bytes: u64) -> Self {
        Self {
            pool,
            area,
            bytes,
            uses: Uses::new(),
            is_lost: false,
        }
    }

    /// Address of the first byte, for the host and for the devices of the platform; a multiple of 512. Zero
    /// for a block of zero bytes.
    #[must_use]
    pub fn ptr(&self) -> DevicePtr {
        self.area.as_ref().map_or(DevicePtr(0), |area| area.ptr)
    }

    /// Bytes asked for: the length of the slices.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes taken from the pool.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.area.as_ref().map_or(0, |area| area.bytes)
    }

    /// Makes work enqueued on `stream` from now on wait for all uses recorded so far: to be called before
    /// work that uses the block is enqueued there. The host does not wait.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stream of another platform, or after a use was lost;
    /// [`Error::Capturing`] if `stream` is part of a capture, whose work could run at any later time;
    /// [`Error::Driver`] if the driver refuses. Then nothing must be enqueued.
    pub fn order(&self, stream: &Stream) -> Result<()> {
        self.check_not_lost()?;
        if stream.driver().platform() != self.pool.device.driver().platform() {
            let reason = "the stream cannot reach this memory";
            return Err(Error::argument("order", reason));
        }
        if stream.driver().is_capturing(stream.raw())? {
            return Err(Error::Capturing { call: "order" });
        }
        let others = self.uses.iter().filter(|used| used.stream != stream.id());
        others
            .into_iter()
            .try_for_each(|used| stream.wait(&used.event))
    }

    /// Says that work enqueued on `stream` so far uses the block. To be called after each such work, before
    /// the block is dropped or its bytes are looked at.
    ///
    /// Where the stream's end cannot be marked, the host waits for the stream instead.
    ///
    /// # Errors
    /// [`Error::Capturing`] if `stream` is part of a capture; [`Error::Driver`] if the use can be neither
    /// marked nor waited for. Either way the use is lost: the bytes cannot be had any more, and the memory
    /// is never handed out again.
    pub fn record_use(&mut self, stream: &Stream) -> Result<()> {
        if self.area.is_none() {
            return Ok(());
        }
        let marked = mark(stream);
        self.is_lost |= marked.is_err();
        self.uses.retain(|used| used.stream != stream.id());
        let stream = stream.id();
        self.uses.extend(marked?.map(|event| Use { stream, event }));
        Ok(())
    }

    /// Whether no recorded use is in flight; never blocks.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let mut events = self.uses.iter().map(|used| &used.event);
        !self.is_lost && events.all(|event| event.is_complete().unwrap_or(false))
    }

    /// Blocks until no recorded use is in flight.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of a stream failed, so that it cannot be told;
    /// [`Error::InvalidArgument`] after a use was lost.
    pub fn wait(&self) -> Result<()> {
        self.check_not_lost()?;
        let mut events = self.uses.iter().map(|used| &used.event);
        events.try_for_each(Event::synchronize)
    }

    /// The bytes, after [`wait`](Self::wait). Those that nobody wrote have any value.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn as_slice(&self) -> Result<&[u8]> {
        self.wait()?;
        let Some(area) = &self.area else {
            return Ok(&[]);
        };
        let start = std::ptr::with_exposed_provenance(to_usize(area.ptr.0));
        // SAFETY: the block owns the area, which is mapped, at least this long, and was written as a whole
        // when it was taken from the driver. No stream uses it: recorded uses have passed, who enqueues
        // work promises to record it, and to record more takes the block mutably.
        Ok(unsafe { slice::from_raw_parts(start, to_usize(self.bytes)) })
    }

    /// The bytes, for writing, after [`wait`](Self::wait).
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn as_mut_slice(&mut self) -> Result<&mut [u8]> {
        self.wait()?;
        self.uses.clear();
        let Some(area) = &self.area else {
            return Ok(&mut []);
        };
        let start = std::ptr::with_exposed_provenance_mut(to_usize(area.ptr.0));
        // SAFETY: as in `as_slice`; that the block is borrowed mutably keeps the host's other readers out.
        Ok(unsafe { slice::from_raw_parts_mut(start, to_usize(self.bytes)) })
    }

    fn check_not_lost(&self) -> Result<()> {
        if !self.is_lost {
            return Ok(());
        }
        let reason = "a use could not be followed, so it may be in flight for ever";
        Err(Error::argument("PinnedBlock", reason))
    }
}

/// Marks the present end of `stream`, or waits for it; `None` if it was waited for.
fn mark(stream: &Stream) -> Result<Option<Event>> {
    let marked = match stream.driver().is_capturing(stream.raw()) {
        // A mark inside a capture never comes to pass, and waiting would end the capture.
        Ok(true) => return Err(Error::Capturing { call: "record_use" }),
        Ok(false) => stream.record(),
        Err(error) => Err(error),
    };
    match marked {
        Ok(event) => Ok(Some(event)),
        Err(_) => stream.synchronize().map(|()| None),
    }
}

impl Drop for PinnedBlock {
    fn drop(&mut self) {
        if let Some(area) = self.area.take() {
            let mut uses = std::mem::take(&mut self.uses);
            // Asked here, without the pool's lock.
            have_passed(&mut uses);
            let uses = (!self.is_lost).then_some(uses);
            self.pool.free(area, self.bytes, uses);
        }
    }
}

impl fmt::Debug for PinnedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PinnedBlock({} of {} bytes at {:#x})",
            self.bytes,
            self.allocated(),
            self.ptr().0
        )
    }
}
