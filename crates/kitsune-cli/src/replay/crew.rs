//! Runs players on their host threads. All start each pass together; one of them, the leader, decides what comes next.

use std::any::Any;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::backend::{Backend, Trouble};
use super::player::Player;
use super::program::HostThread;
use super::shift::Shift;

/// What stopped a player.
#[derive(Debug)]
pub(crate) struct Stop {
    /// Index of the player.
    pub(crate) player: usize,
    /// Line of the trace whose operation failed; 0 if there is none.
    pub(crate) line: u64,
    pub(crate) trouble: Trouble,
}

/// How a pass went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass {
    /// Time from the common start until the last thread has finished all rounds.
    pub(crate) elapsed: Duration,
    /// How often each program was played.
    pub(crate) rounds: u32,
}

/// What the threads report to the leader about one pass.
#[derive(Default)]
struct Told {
    elapsed: Duration,
    ooms: u64,
    stop: Option<Stop>,
    panic: Option<Box<dyn Any + Send>>,
}

/// The state that the threads of a crew share.
struct Crew<'a, B: Backend> {
    shifts: Vec<Shift<'a, B>>,
    /// Before and after each pass.
    together: Barrier,
    /// Rounds of the next pass; 0 ends the run.
    rounds: AtomicU32,
    told: Mutex<Told>,
}

impl<B: Backend> Crew<'_, B> {
    /// Waits for the next pass and plays the turns of one host thread of a program. Returns false once the run is over.
    fn work(&self, number: usize, thread: HostThread) -> bool {
        self.together.wait();
        // Relaxed: the barrier orders it.
        if self.rounds.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let began = Instant::now();
        self.shifts[number].work(thread);
        if thread == 0 {
            self.tell(number, began.elapsed());
        }
        self.together.wait();
        true
    }

    /// Leads all passes and takes part in them as host thread 0 of the first program. Returns the last report, after
    /// ending the run for all threads.
    fn lead(&self, mut lead: impl FnMut(Option<(Pass, u64)>) -> u32) -> Told {
        let (mut told, mut before) = (Told::default(), None);
        loop {
            let goes_on = told.stop.is_none() && told.panic.is_none();
            let rounds = if goes_on { lead(before) } else { 0 };
            for shift in &self.shifts {
                shift.prepare(rounds);
            }
            self.rounds.store(rounds, Ordering::Relaxed);
            if !self.work(0, 0) {
                return told;
            }
            told = self.take_told();
            let elapsed = told.elapsed;
            before = Some((Pass { elapsed, rounds }, told.ooms));
        }
    }

    fn tell(&self, player: usize, elapsed: Duration) {
        let Some((ooms, outcome)) = self.shifts[player].take_outcome() else {
            return;
        };
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

/// Plays the players' programs together, pass after pass, each on its host threads. `lead` receives the previous pass
/// and its number of failed allocations, and returns the number of rounds of the next pass; 0 ends the run.
///
/// # Errors
/// What stopped a player. No further pass is played then.
///
/// # Panics
/// If a player panics, after all of them have stopped.
pub(crate) fn play<B: Backend>(
    players: Vec<Player<'_, B>>,
    lead: impl FnMut(Option<(Pass, u64)>) -> u32,
) -> Result<(), Stop> {
    let shifts: Vec<_> = players.into_iter().map(Shift::new).collect();
    let threads: Vec<(usize, HostThread)> = (shifts.iter().enumerate())
        .flat_map(|(number, shift)| (0..).take(shift.threads()).map(move |t| (number, t)))
        .collect();
    if threads.is_empty() {
        return Ok(());
    }
    let crew = Crew {
        shifts,
        together: Barrier::new(threads.len()),
        rounds: AtomicU32::new(0),
        told: Mutex::default(),
    };
    let last = thread::scope(|scope| {
        let crew = &crew;
        // The first one leads, on this thread.
        let spawn = |(number, thread)| scope.spawn(move || while crew.work(number, thread) {});
        let threads: Vec<_> = threads.into_iter().skip(1).map(spawn).collect();
        let last = crew.lead(lead);
        // The scope waits until the threads' closures return, but not for their thread-local destructors, which return
        // an allocator's thread caches. Joining waits for those, too.
        for thread in threads {
            thread.join().expect("the panic of a player is caught");
        }
        last
    });
    match (last.panic, last.stop) {
        (Some(panic), _) => resume_unwind(panic),
        (None, Some(stop)) => Err(stop),
        (None, None) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};
    use std::sync::Arc;
    use std::sync::mpsc::sync_channel;

    use kitsune::telemetry::trace::Event;

    use super::super::player::{Handoff, Tools};
    use super::super::program::{Builder, Program, StreamIndex};
    use super::*;

    /// Counts allocations down; the last one fails, by an error or by a panic. Every other one finds no memory.
    struct Failing {
        left: u32,
        panics: bool,
    }

    impl Backend for Failing {
        type Block = u64;

        fn allocate(&mut self, bytes: u64, _: StreamIndex) -> Result<Option<u64>, Trouble> {
            self.left -= 1;
            assert!(
                self.left > 0 || !self.panics,
                "this panic is part of the test"
            );
            match self.left {
                0 => Err(Trouble::Overwritten("on purpose".to_owned())),
                left => Ok(left.is_multiple_of(2).then_some(bytes)),
            }
        }

        fn bytes(block: &u64) -> u64 {
            *block
        }

        fn record_stream(&mut self, _: &mut u64, _: StreamIndex) -> Result<(), Trouble> {
            Ok(())
        }

        fn free(&mut self, _: u64) -> Result<(), Trouble> {
            Ok(())
        }

        fn synchronize(&mut self, _: Option<StreamIndex>) -> Result<(), Trouble> {
            Ok(())
        }

        fn trim(&mut self) -> Result<(), Trouble> {
            Ok(())
        }
    }

    /// A producer of 1,000 blocks, with line 7 for all of them, and its consumer.
    fn programs() -> [Program; 2] {
        let (mut producer, mut consumer) = (Builder::default(), Builder::default());
        for id in 0..1000 {
            producer.push(
                &Event::Allocate {
                    id,
                    bytes: 8,
                    stream: 0,
                },
                7,
            );
            producer.send(id);
            consumer.receive(id);
            consumer.push(&Event::Free { id, stream: None }, 0);
        }
        [producer.finish(), consumer.finish()]
    }

    /// Plays both programs, three times if nothing fails. Returns the failed allocations of each complete pass.
    fn outcome(left: u32, panics: bool) -> (Vec<u64>, Result<(), Stop>) {
        let [producer, consumer] = &programs();
        let (to, from) = sync_channel(4);
        let player = |program, handoff| {
            Player::new(program, Failing { left, panics }, handoff, Tools::default())
        };
        let players = vec![
            player(producer, Handoff::To(to)),
            player(consumer, Handoff::From(from)),
        ];
        let mut ooms = Vec::new();
        let outcome = play(players, |before| {
            ooms.extend(before.map(|(_, ooms)| ooms));
            u32::from(ooms.len() < 3)
        });
        (ooms, outcome)
    }

    #[test]
    fn passes_are_told_until_the_leader_ends_them() {
        let (ooms, outcome) = outcome(u32::MAX, false);
        assert!(outcome.is_ok());
        assert_eq!(ooms, [500, 500, 500]);
    }

    #[test]
    fn a_failure_stops_all_threads_and_names_its_line() {
        let (ooms, outcome) = outcome(1500, false);
        assert_eq!(ooms.len(), 1, "the second pass failed");
        let stop = outcome.unwrap_err();
        assert_eq!((stop.player, stop.line), (0, 7));
    }

    /// Notes which thread makes each allocation.
    struct Noting(Arc<Mutex<Vec<(u64, thread::ThreadId)>>>);

    impl Backend for Noting {
        type Block = u64;

        fn allocate(&mut self, bytes: u64, _: StreamIndex) -> Result<Option<u64>, Trouble> {
            let calls = &mut self.0.lock().unwrap();
            calls.push((bytes, thread::current().id()));
            Ok(Some(bytes))
        }

        fn bytes(block: &u64) -> u64 {
            *block
        }

        fn record_stream(&mut self, _: &mut u64, _: StreamIndex) -> Result<(), Trouble> {
            Ok(())
        }

        fn free(&mut self, _: u64) -> Result<(), Trouble> {
            Ok(())
        }

        fn synchronize(&mut self, _: Option<StreamIndex>) -> Result<(), Trouble> {
            Ok(())
        }

        fn trim(&mut self) -> Result<(), Trouble> {
            Ok(())
        }
    }

    #[test]
    fn host_threads_take_turns_in_the_order_of_the_program() {
        let mut builder = Builder::default();
        let turns = [0, 2, 1, 2, 0, 1];
        for (id, thread) in (0..).zip(turns) {
            builder.push(&Event::Thread { thread }, 0);
            let (bytes, stream) = (id, 0);
            builder.push(&Event::Allocate { id, bytes, stream }, 0);
        }
        let program = builder.finish();
        let calls = Arc::default();
        let player = Player::new(
            &program,
            Noting(Arc::clone(&calls)),
            Handoff::None,
            Tools::default(),
        );
        let mut passes = 0;
        play(vec![player], |_| {
            passes += 1;
            // The second pass has two rounds.
            [1, 2, 0][passes - 1]
        })
        .unwrap();
        let calls = calls.lock().unwrap();
        assert_eq!(calls.len(), 3 * turns.len());
        let mut threads = HashMap::new();
        for (round, calls) in calls.chunks(turns.len()).enumerate() {
            for (at, (bytes, thread)) in calls.iter().enumerate() {
                assert_eq!(*bytes, at as u64, "round {round}");
                let known = threads.entry(turns[at]).or_insert(*thread);
                assert_eq!(known, thread, "round {round}");
            }
        }
        let distinct: HashSet<_> = threads.values().collect();
        assert_eq!((threads.len(), distinct.len()), (3, 3));
        assert_eq!(threads[&0], thread::current().id());
    }

    #[test]
    fn a_failure_on_any_host_thread_stops_all_of_them() {
        let mut builder = Builder::default();
        for id in 0..10 {
            let thread = u32::try_from(id % 2).unwrap();
            builder.push(&Event::Thread { thread }, 0);
            let (bytes, stream) = (8, 0);
            builder.push(&Event::Allocate { id, bytes, stream }, id + 2);
        }
        let program = builder.finish();
        // The eighth allocation fails, on thread 1.
        let failing = Failing {
            left: 8,
            panics: false,
        };
        let player = Player::new(&program, failing, Handoff::None, Tools::default());
        let stop = play(vec![player], |_| 1).unwrap_err();
        assert_eq!((stop.player, stop.line), (0, 9));
    }

    #[test]
    #[should_panic(expected = "this panic is part of the test")]
    fn a_panic_comes_through_and_hangs_nobody() {
        drop(outcome(10, true));
    }
}
