//! Copies the journal to the host without waiting.
//!
//! [`Readback::poll`] enqueues a copy to pinned memory and returns; a later call finds it complete. The host thus
//! learns of events a few steps late and never waits.

use crate::error::Result;
use crate::launch::journal::JOURNAL_WORDS;
use crate::memory::{PinnedBlock, PinnedPool};
use crate::storage::{Context, Tensor};

/// The newest copy that arrived, and the pending one.
#[derive(Debug)]
pub(super) struct Readback {
    block: PinnedBlock,
    /// The last step that the pending copy will contain.
    under_way: Option<u64>,
    /// Whether the scaler's state was replaced after the pending copy was enqueued.
    is_outdated: bool,
    /// The copy that arrived last, and the last step it contains.
    arrived: Option<(u64, Vec<f64>)>,
}

impl Readback {
    pub(super) fn new(context: &Context) -> Result<Self> {
        let bytes = (JOURNAL_WORDS * size_of::<f64>()) as u64;
        Ok(Self {
            block: PinnedPool::new(context.device()).allocate(bytes)?,
            under_way: None,
            is_outdated: false,
            arrived: None,
        })
    }

    /// A copy of `journal` that contains step `step`, if one arrived. Otherwise makes sure that a copy is pending;
    /// `steps` is the last step that a copy enqueued now contains.
    pub(super) fn poll(
        &mut self,
        journal: &Tensor,
        step: u64,
        steps: u64,
    ) -> Result<Option<&[f64]>> {
        self.take_in()?;
        let knows = matches!(&self.arrived, Some((known, _)) if *known >= step);
        if !knows {
            self.start(journal, steps)?;
        }
        Ok(self
            .arrived
            .as_ref()
            .filter(|_| knows)
            .map(|(_, words)| words.as_slice()))
    }

    /// Enqueues a copy, unless one is pending.
    pub(super) fn start(&mut self, journal: &Tensor, steps: u64) -> Result<()> {
        if self.under_way.is_none() {
            journal.copy_to_pinned(&mut self.block)?;
            self.under_way = Some(steps);
        }
        Ok(())
    }

    /// Marks the pending copy as outdated: it still answers for the steps it contains, but says nothing about the
    /// scaler's current state.
    pub(super) fn outdate(&mut self) {
        self.is_outdated = self.under_way.is_some();
    }

    /// The pending copy, once, if it has arrived and is not outdated.
    pub(super) fn take_in(&mut self) -> Result<Option<&[f64]>> {
        let Some(known) = self.under_way.filter(|_| self.block.is_idle()) else {
            return Ok(None);
        };
        let words = self.block.as_slice()?.chunks_exact(size_of::<f64>());
        let words = words
            .map(|bytes| f64::from_ne_bytes(bytes.try_into().expect("chunks of eight bytes")))
            .collect();
        self.under_way = None;
        let is_news = !std::mem::take(&mut self.is_outdated);
        let (_, words) = self.arrived.insert((known, words));
        Ok(Some(&**words).filter(|_| is_news))
    }
}
