//! A copy of the journal on the host that is made without waiting for it.
//!
//! [`Readback::poll`] enqueues a copy to pinned memory and returns; a later call finds it complete. So the
//! host learns what happened some steps late, and never stops for it.

use crate::error::Result;
use crate::launch::journal::JOURNAL_WORDS;
use crate::memory::{PinnedBlock, PinnedPool};
use crate::storage::{Context, Tensor};

/// The newest copy that arrived, and the one under way.
#[derive(Debug)]
pub(super) struct Readback {
    block: PinnedBlock,
    /// What the copy under way will know: all steps up to this one.
    under_way: Option<u64>,
    /// Whether the scaler's state was replaced after the copy under way was enqueued.
    is_outdated: bool,
    /// The copy that arrived last, and the steps it knows.
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

    /// A copy of `journal` that knows step `step`, if one arrived. Otherwise sees to it that one is under way,
    /// in which all steps up to `steps` will be.
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

    /// Puts a copy under way, unless one is.
    pub(super) fn start(&mut self, journal: &Tensor, steps: u64) -> Result<()> {
        if self.under_way.is_none() {
            journal.copy_to_pinned(&mut self.block)?;
            self.under_way = Some(steps);
        }
        Ok(())
    }

    /// The copy under way answers questions about the steps that it knows, and is no news of the scaler's state.
    pub(super) fn outdate(&mut self) {
        self.is_outdated = self.under_way.is_some();
    }

    /// The copy that was under way, once, when it has arrived and is not outdated.
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
