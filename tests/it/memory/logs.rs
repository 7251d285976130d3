//! The log around an allocator: what it writes, in which order, and what a sink that fails does to it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;

use kitsune::memory::{Allocate, Limit, Log, LogAction, LogEvent, LogSink};
use kitsune::telemetry::ReplayCsv;
use kitsune::telemetry::trace::{Event, TraceLog, TraceReader};
use kitsune::units::MIB;
use kitsune::{
    Block, Device, HostConfig, HostSchedule, Pool, PoolConfig, Result, ReusePolicy, Stream,
};
use parking_lot::Mutex;

fn pool() -> (Pool, Stream) {
    let host = HostConfig {
        capacity: 1 << 30,
        schedule: HostSchedule::Seeded(1),
        ..HostConfig::default()
    };
    let device = Device::host(host).unwrap();
    // Addresses and peaks then depend on the calls alone.
    let config = PoolConfig {
        reuse: ReusePolicy::Wait,
        ..PoolConfig::default()
    };
    let stream = device.create_stream().unwrap();
    (Pool::new(&device, config).unwrap(), stream)
}

/// Output that the test keeps a handle of, and that refuses everything from byte `end` on.
#[derive(Clone)]
struct Output {
    bytes: Arc<Mutex<Vec<u8>>>,
    end: usize,
}

impl Output {
    fn new(end: usize) -> Self {
        let bytes = Arc::default();
        Self { bytes, end }
    }

    fn text(&self) -> String {
        String::from_utf8(self.bytes.lock().clone()).unwrap()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut taken = self.bytes.lock();
        if taken.len() + bytes.len() > self.end {
            return Err(io::ErrorKind::StorageFull.into());
        }
        taken.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_csv_has_a_row_for_each_event() {
    let (pool, stream) = pool();
    let other = pool.device().create_stream().unwrap();
    let output = Output::new(usize::MAX);
    let log = Log::new(
        Limit::new(pool, 2048),
        ReplayCsv::new(output.clone()).unwrap(),
    );
    let mut first = log.allocate(1000, &stream).unwrap();
    first.record_stream(&other);
    assert!(log.allocate(5000, &other).is_err());
    drop(log.allocate(0, &stream).unwrap());
    let second = log.allocate(1, &other).unwrap();
    let pointers = [first.ptr(), second.ptr()].map(|ptr| format!("{:#x}", ptr.0));
    thread::scope(|scope| {
        scope.spawn(|| drop(first));
    });
    drop(second);
    log.flush().unwrap();

    let text = output.text();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("Thread,Time,Action,Pointer,Size,Stream"));
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    let [here, there] = [stream.id(), other.id()].map(|id| id.0.to_string());
    let expected = [
        ["allocate", &pointers[0], "1000", &here],
        ["allocate failure", "(nil)", "5000", &there],
        ["allocate", &pointers[1], "1", &there],
        ["free", &pointers[0], "1000", &here],
        ["free", &pointers[1], "1", &there],
    ];
    let found: Vec<&[&str]> = rows.iter().map(|row| &row[2..]).collect();
    assert_eq!(found, expected);
    for row in &rows {
        row[0].parse::<u64>().unwrap();
        let [hours, minutes, seconds] = row[1].split(':').collect::<Vec<_>>()[..] else {
            panic!("{}", row[1]);
        };
        assert!(hours.len() == 2 && minutes.len() == 2 && seconds.len() == 9);
    }
    assert_eq!(rows[0][0], rows[1][0]);
    assert_ne!(rows[0][0], rows[3][0], "freed by another thread");
}

/// A random program on two streams, through `allocator`.
fn run(allocator: &dyn Allocate, streams: &[Stream; 2]) {
    let mut random = fastrand::Rng::with_seed(11);
    let mut blocks: Vec<Block> = Vec::new();
    for _ in 0..2000 {
        let stream = &streams[random.usize(0..2)];
        match random.u32(0..10) {
            0..5 => {
                let bytes = match random.u32(0..4) {
                    0 => random.u64(1..3 * MIB),
                    _ => random.u64(1..20_000),
                };
                blocks.extend(allocator.allocate(bytes, stream).ok());
            }
            5..9 if !blocks.is_empty() => {
                drop(blocks.swap_remove(random.usize(0..blocks.len())));
            }
            _ => {
                if let Some(block) = random.choice(blocks.iter_mut()) {
                    block.record_stream(stream);
                }
            }
        }
    }
}

/// Repeats a trace through `allocator`, as its reader understands it.
fn replay(text: &str, allocator: &dyn Allocate, streams: &[Stream; 2]) {
    let mut blocks: HashMap<u64, Block> = HashMap::new();
    let mut marks = 0;
    for event in TraceReader::new(text.as_bytes()).unwrap() {
        match event.unwrap() {
            Event::Allocate { id, bytes, stream } => {
                let block = allocator.allocate(bytes, &streams[stream as usize]);
                blocks.insert(id, block.unwrap());
            }
            Event::Free { id, stream } => {
                assert_eq!(stream, None);
                drop(blocks.remove(&id).unwrap());
            }
            Event::RecordStream { id, stream } => {
                let block = blocks.get_mut(&id).unwrap();
                block.record_stream(&streams[stream as usize]);
            }
            Event::Mark(text) => {
                assert!(text.starts_with("no room for "), "{text}");
                marks += 1;
            }
            other => panic!("{other:?} is not an allocator's event"),
        }
    }
    assert!(marks > 0, "the limit was never reached");
}

#[test]
fn a_logged_run_reads_back_and_repeats() {
    let logged = |work: &dyn Fn(&dyn Allocate, &[Stream; 2]), limit: u64| {
        let (pool, first) = pool();
        // The trace numbers streams as they come up; the program begins on either.
        let streams = [first, pool.device().create_stream().unwrap()];
        let output = Output::new(usize::MAX);
        let sink = TraceLog::new(output.clone(), "run", 2).unwrap();
        let log = Log::new(Limit::new(pool.clone(), limit), sink);
        work(&log, &streams);
        log.flush().unwrap();
        pool.check_invariants();
        (output.text(), pool.stats())
    };
    let (text, stats) = logged(&|log, streams| run(log, streams), 20 * MIB);
    assert!(text.starts_with("#alloctrace v1 streams=2 name=run threads=64\n"));
    let (again, repeated) = logged(&|log, streams| replay(&text, log, streams), u64::MAX);
    let events = |text: &str| -> Vec<String> {
        // Requests that failed were not repeated, so later ones have lower numbers.
        let mut ids = HashMap::new();
        let lines = text.lines().filter(|line| !line.starts_with('m'));
        let renumbered = lines.map(|line| {
            let mut fields: Vec<String> = line.split(' ').map(str::to_owned).collect();
            let next = ids.len();
            fields[1] = ids.entry(fields[1].clone()).or_insert(next).to_string();
            fields.join(" ")
        });
        renumbered.collect()
    };
    assert_eq!(events(&text), events(&again));
    for (one, two) in [
        (stats.requested_bytes, repeated.requested_bytes),
        (stats.allocated_bytes, repeated.allocated_bytes),
        (stats.allocation, repeated.allocation),
        (stats.reserved_bytes, repeated.reserved_bytes),
    ] {
        assert_eq!(one, two);
    }
}

#[test]
fn threads_make_one_log_in_a_sound_order() {
    let (pool, stream) = pool();
    let output = Output::new(usize::MAX);
    let log = Log::new(pool, TraceLog::new(output.clone(), "threads", 1).unwrap());
    let (sender, receiver) = crossbeam::channel::bounded::<Block>(16);
    thread::scope(|scope| {
        for _ in 0..3 {
            let (sender, log, stream) = (sender.clone(), &log, &stream);
            scope.spawn(move || {
                for bytes in 1..500 {
                    sender
                        .send(log.allocate(bytes * 40, stream).unwrap())
                        .unwrap();
                    drop(log.allocate(64, stream).unwrap());
                }
            });
        }
        drop(sender);
        receiver.iter().for_each(drop);
    });
    log.flush().unwrap();
    let text = output.text();
    // The reader refuses ids that are freed before they are live.
    let events: Result<Vec<Event>, _> = TraceReader::new(text.as_bytes()).unwrap().collect();
    let (turns, calls): (Vec<_>, Vec<_>) =
        (events.unwrap().into_iter()).partition(|event| matches!(event, Event::Thread { .. }));
    assert_eq!(calls.len(), 3 * 499 * 4);
    // Three threads allocate; this one frees.
    for thread in 0..4 {
        assert!(turns.contains(&Event::Thread { thread }), "thread {thread}");
    }
    assert!(!turns.contains(&Event::Thread { thread: 4 }));
}

#[test]
fn a_sink_that_fails_stops_the_log_and_not_the_program() {
    let (pool, stream) = pool();
    let whole = Output::new(usize::MAX);
    let program = |output: &Output| {
        let sink = TraceLog::new(output.clone(), "full", 1).unwrap();
        let log = Log::new(pool.clone(), sink);
        for bytes in 1..6 {
            drop(log.allocate(bytes, &stream).unwrap());
        }
        log
    };
    program(&whole).flush().unwrap();
    let whole = whole.text();
    let header = whole.find('\n').unwrap() + 1;
    for end in header..whole.len() {
        let output = Output::new(end);
        let log = program(&output);
        let taken = output.text();
        // The last line may be cut off, which the reader tells.
        let complete = taken.matches('\n').count() as u64 - 1;
        assert!(whole.starts_with(&taken));
        for _ in 0..2 {
            let error = log.flush().unwrap_err();
            assert_eq!(error.missing, 10 - complete, "disk of {end} bytes");
            assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
            assert!(error.to_string().starts_with("the log is incomplete"));
        }
    }
    pool.check_invariants();
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_behind_a_buffer_is_told_by_the_flush() {
    let (pool, stream) = pool();
    let full = std::fs::File::create("/dev/full").unwrap();
    let log = Log::new(pool, ReplayCsv::new(io::BufWriter::new(full)).unwrap());
    drop(log.allocate(1, &stream).unwrap());
    let error = log.flush().unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
    drop(log.allocate(1, &stream).unwrap());
    assert_eq!(log.flush().unwrap_err().missing, 2);
}

#[test]
fn a_trace_refuses_streams_that_it_did_not_announce() {
    let (pool, stream) = pool();
    let other = pool.device().create_stream().unwrap();
    let output = Output::new(usize::MAX);
    let log = Log::new(pool, TraceLog::new(output.clone(), "one", 1).unwrap());
    let kept = log.allocate(1, &stream).unwrap();
    drop(log.allocate(1, &other).unwrap());
    let error = log.flush().unwrap_err();
    assert!(
        error.to_string().contains("stream 1 does not exist"),
        "{error}"
    );
    assert_eq!(error.missing, 2);
    drop(kept);
    assert_eq!(output.text().lines().count(), 2);
    assert!(TraceLog::new(io::sink(), "two words", 1).is_err());
}

#[test]
fn a_sink_of_ones_own_sees_every_field() {
    #[derive(Clone, Default)]
    struct Events(Arc<Mutex<Vec<LogEvent>>>);
    impl LogSink for Events {
        fn write(&mut self, event: &LogEvent) -> io::Result<()> {
            self.0.lock().push(event.clone());
            Ok(())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (pool, stream) = pool();
    let other = pool.device().create_stream().unwrap();
    let events = Events::default();
    let log = Log::new(pool, events.clone());
    let mut block = log.allocate(100, &stream).unwrap();
    let ptr = block.ptr();
    for user in [&other, &stream, &other] {
        block.record_stream(user);
    }
    drop((log, block));
    let events = events.0.lock();
    let actions: Vec<LogAction> = events.iter().map(|event| event.action).collect();
    use LogAction::{Allocate, Free, RecordStream};
    assert_eq!(actions, [Allocate, RecordStream, Free]);
    assert!(events.iter().all(|event| event.ptr == ptr));
    assert!(
        events
            .iter()
            .all(|event| (event.request, event.bytes) == (0, 100))
    );
    let streams: Vec<_> = events.iter().map(|event| event.stream).collect();
    assert_eq!(streams, [stream.id(), other.id(), stream.id()]);
    assert!(events.is_sorted_by_key(|event| event.time));
}
