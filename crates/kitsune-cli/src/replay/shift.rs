//! The host threads of one program, which take turns with its player.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::backend::{Backend, Trouble};
use super::player::Player;
use super::program::HostThread;

/// How a pass of a program ended: well, with the line and reason of a failure, or with a panic.
pub(super) type Outcome = thread::Result<Result<(), (u64, Trouble)>>;

/// A player and whose turn it is.
pub(super) struct Shift<'a, B: Backend> {
    state: Mutex<State<'a, B>>,
    changed: Condvar,
}

struct State<'a, B: Backend> {
    /// `None` once the player has stopped: that closes its end of a hand-off, so that a partner does not wait for it.
    player: Option<Player<'a, B>>,
    turn: HostThread,
    rounds_left: u32,
    outcome: Outcome,
}

impl<'a, B: Backend> Shift<'a, B> {
    pub(super) fn new(player: Player<'a, B>) -> Self {
        Self {
            state: Mutex::new(State {
                player: Some(player),
                turn: 0,
                rounds_left: 0,
                outcome: Ok(Ok(())),
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<'a, B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of host threads.
    pub(super) fn threads(&self) -> usize {
        let state = self.lock();
        state.player.as_ref().map_or(0, Player::threads)
    }

    /// Sets the rounds of the next pass. To be called by one thread, while none works.
    pub(super) fn prepare(&self, rounds: u32) {
        self.lock().rounds_left = rounds;
    }

    /// Plays the turns of host thread `thread` until all rounds are over or the player has stopped.
    pub(super) fn work(&self, thread: HostThread) {
        let mut state = self.lock();
        loop {
            while state.turn != thread && state.goes_on() {
                let woken = self.changed.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
            }
            if !state.goes_on() {
                break;
            }
            state.play();
            self.changed.notify_all();
        }
    }

    /// Takes the failed allocations of a pass and its outcome. A player that has stopped has none.
    pub(super) fn take_outcome(&self) -> Option<(u64, Outcome)> {
        let mut state = self.lock();
        let outcome = std::mem::replace(&mut state.outcome, Ok(Ok(())));
        match &mut state.player {
            Some(player) => Some((player.take_ooms(), outcome)),
            None if !matches!(outcome, Ok(Ok(()))) => Some((0, outcome)),
            None => None,
        }
    }
}

impl<B: Backend> State<'_, B> {
    fn goes_on(&self) -> bool {
        self.rounds_left > 0 && self.player.is_some()
    }

    /// Plays one turn, and says whose turn is next.
    fn play(&mut self) {
        let Some(player) = &mut self.player else {
            return;
        };
        // A panic must not leave the other threads waiting.
        match catch_unwind(AssertUnwindSafe(|| player.turn())) {
            Ok(Ok(Some(next))) => self.turn = next,
            Ok(Ok(None)) => {
                self.turn = 0;
                self.rounds_left -= 1;
            }
            Ok(Err(stop)) => self.stop(Ok(Err(stop))),
            Err(panic) => self.stop(Err::<_, Box<dyn Any + Send>>(panic)),
        }
    }

    fn stop(&mut self, outcome: Outcome) {
        self.outcome = outcome;
        self.player = None;
    }
}
