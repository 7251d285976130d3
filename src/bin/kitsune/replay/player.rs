//! Plays programs: one on each host thread, pass after pass, with the time of each pass.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::backend::{Backend, Trouble};
use super::probe::AllocationClock;
use super::program::{Operation, Program};

/// Blocks that may be on their way from one thread to its partner.
pub(crate) const HANDOFF_CAPACITY: usize = 256;

/// One thread's program with its blocks.
pub(crate) struct Player<'a, B: Backend> {
    program: &'a Program,
    backend: B,
    slots: Vec<Option<B::Block>>,
    handoff: Handoff<B::Block>,
    clock: Option<Arc<AllocationClock>>,
    /// Allocations that found no room, in all passes.
    ooms: u64,
}

/// How a thread meets its partner. A block that could not be allocated is handed on as `None`.
pub(crate) enum Handoff<T> {
    None,
    To(SyncSender<Option<T>>),
    From(Receiver<Option<T>>),
}

/// What stopped a player.
#[derive(Debug)]
pub(crate) struct Stop {
    /// Which of the players, in their order.
    pub(crate) player: usize,
    /// Line of the trace that asked for what failed; 0 if none did.
    pub(crate) line: u64,
    pub(crate) trouble: Trouble,
}

impl<'a, B: Backend> Player<'a, B> {
    /// A player of `program`. Where `clock` is given, it ticks with every allocation.
    pub(crate) fn new(
        program: &'a Program,
        backend: B,
        handoff: Handoff<B::Block>,
        clock: Option<Arc<AllocationClock>>,
    ) -> Self {
        let slots = (0..program.slots).map(|_| None).collect();
        Self {
            program,
            backend,
            slots,
            handoff,
            clock,
            ooms: 0,
        }
    }

    /// Plays the program once. After an error the player is of no more use.
    fn pass(&mut self) -> Result<(), (u64, Trouble)> {
        for (at, operation) in self.program.operations.iter().enumerate() {
            let outcome = self.play(*operation);
            outcome.map_err(|trouble| (self.program.line(at), trouble))?;
        }
        self.backend.finish().map_err(|trouble| (0, trouble))
    }

    #[inline]
    fn play(&mut self, operation: Operation) -> Result<(), Trouble> {
        match operation {
            Operation::Allocate {
                slot,
                stream,
                bytes,
            } => {
                if let Some(clock) = &self.clock {
                    clock.tick();
                }
                let block = self.backend.allocate(bytes, stream)?;
                self.ooms += u64::from(block.is_none());
                self.slots[slot as usize] = block;
                Ok(())
            }
            Operation::Free { slot } => match self.slots[slot as usize].take() {
                Some(block) => self.backend.free(block),
                None => Ok(()),
            },
            Operation::RecordStream { slot, stream } => match &mut self.slots[slot as usize] {
                Some(block) => self.backend.record_stream(block, stream),
                None => Ok(()),
            },
            Operation::Wait { waiter, signaller } => self.backend.wait(waiter, signaller),
            Operation::Synchronize { stream } => self.backend.synchronize(stream),
            Operation::Trim => self.backend.trim(),
            Operation::Send { slot } => {
                let block = self.slots[slot as usize].take();
                if let Handoff::To(partner) = &self.handoff {
                    // A partner that is gone has stopped for a reason of its own, which is told.
                    let _ = partner.send(block);
                }
                Ok(())
            }
            Operation::Receive { slot } => {
                if let Handoff::From(partner) = &self.handoff {
                    self.slots[slot as usize] = partner.recv().unwrap_or(None);
                }
                Ok(())
            }
        }
    }
}

/// How a pass went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass {
    /// From the common start to the last thread's end, for all rounds.
    pub(crate) elapsed: Duration,
    /// How often each program was played.
    pub(crate) rounds: u32,
}

/// What the threads tell their leader about one pass.
#[derive(Default)]
struct Told {
    elapsed: Duration,
    ooms: u64,
    stop: Option<Stop>,
    panic: Option<Box<dyn Any + Send>>,
}

/// What the threads of a crew share.
struct Crew {
    /// Before each pass and after it.
    together: Barrier,
    /// Rounds of the next pass; 0 sends everybody home.
    rounds: AtomicU32,
    told: Mutex<Told>,
}

impl Crew {
    /// Waits for the order to play and follows it; false once there is no more to do.
    fn work<B: Backend>(&self, number: usize, player: &mut Option<Player<'_, B>>) -> bool {
        self.together.wait();
        // Relaxed: the barrier orders it.
        let rounds = self.rounds.load(Ordering::Relaxed);
        if rounds == 0 {
            return false;
        }
        if let Some(playing) = player {
            let began = Instant::now();
            // A panic must not leave the others waiting at the barrier for ever.
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                (0..rounds).try_for_each(|_| playing.pass())
            }));
            let elapsed = began.elapsed();
            let ooms = std::mem::take(&mut playing.ooms);
            if !matches!(outcome, Ok(Ok(()))) {
                // Closes its end of a hand-off, so that a partner does not wait for more.
                *player = None;
            }
            self.tell(number, elapsed, ooms, outcome);
        }
        self.together.wait();
        true
    }

    fn tell(
        &self,
        player: usize,
        elapsed: Duration,
        ooms: u64,
        outcome: thread::Result<Result<(), (u64, Trouble)>>,
    ) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.elapsed = told.elapsed.max(elapsed);
        told.ooms += ooms;
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err((line, trouble))) => {
                told.stop.get_or_insert(Stop {
                    player,
                    line,
                    trouble,
                });
            }
            Err(panic) => {
                told.panic.get_or_insert(panic);
            }
        }
    }

    fn take_told(&self) -> Told {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Plays the players' programs together as long as `lead` asks for it. It is told about the pass before,
/// with the allocations that failed in it, and answers with the rounds of the next one; 0 ends the run.
///
/// # Errors
/// What stopped a player. The pass is then the last one.
///
/// # Panics
/// If a player did, after all of them have come to an end.
pub(crate) fn play<B: Backend>(
    players: Vec<Player<'_, B>>,
    mut lead: impl FnMut(Option<(Pass, u64)>) -> u32,
) -> Result<(), Stop> {
    let crew = Crew {
        together: Barrier::new(players.len()),
        rounds: AtomicU32::new(0),
        told: Mutex::default(),
    };
    let mut players = players.into_iter().enumerate();
    let Some((_, own)) = players.next() else {
        return Ok(());
    };
    thread::scope(|scope| {
        for (number, player) in players {
            let crew = &crew;
            scope.spawn(move || {
                let mut player = Some(player);
                while crew.work(number, &mut player) {}
            });
        }
        let (mut own, mut before) = (Some(own), None);
        loop {
            let rounds = lead(before);
            crew.rounds.store(rounds, Ordering::Relaxed);
            if !crew.work(0, &mut own) {
                return Ok(());
            }
            let told = crew.take_told();
            if told.stop.is_some() || told.panic.is_some() {
                crew.rounds.store(0, Ordering::Relaxed);
                crew.work(0, &mut own);
                return match (told.panic, told.stop) {
                    (Some(panic), _) => resume_unwind(panic),
                    (None, stop) => stop.map_or(Ok(()), Err),
                };
            }
            before = Some((
                Pass {
                    elapsed: told.elapsed,
                    rounds,
                },
                told.ooms,
            ));
        }
    })
}
