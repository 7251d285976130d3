//! Times a pass of a small trace on a pool that has seen its sizes, to notice regressions. `kitsune replay` reports all
//! figures, for traces of any size.

use std::collections::HashMap;

use criterion::{Criterion, criterion_group, criterion_main};
use kitsune::telemetry::trace::{Event, TraceReader};
use kitsune::{Block, Device, HostConfig, HostSchedule, Pool, PoolConfig, Stream};

const TINY: &str = include_str!("../tests/data/tiny.at");

/// Plays a trace. Blocks live at its end are freed there. Kernels and waits are ignored.
fn play(pool: &Pool, streams: &[Stream], events: &[Event], live: &mut HashMap<u64, Block>) {
    for event in events {
        match event {
            Event::Allocate { id, bytes, stream } => {
                let block = pool.allocate(*bytes, &streams[*stream as usize]);
                live.insert(*id, block.expect("there is room"));
            }
            Event::Free { id, .. } => drop(live.remove(id)),
            Event::RecordStream { id, stream } => {
                let block = live.get_mut(id).expect("the reader follows ids");
                block.record_stream(&streams[*stream as usize]);
            }
            _ => {}
        }
    }
    live.clear();
}

fn replay(criterion: &mut Criterion) {
    let reader = TraceReader::new(TINY.as_bytes()).expect("the trace has a header");
    let count = reader.header().streams;
    let events = reader
        .collect::<Result<Vec<_>, _>>()
        .expect("the trace is right");
    // Without threads, because their wake-ups would add to the time.
    let config = HostConfig {
        schedule: HostSchedule::Seeded(0),
        ..HostConfig::default()
    };
    let device = Device::host(config).expect("the host has memory");
    let pool = Pool::new(&device, PoolConfig::default()).expect("the default settings work");
    let streams: Vec<_> = (0..count)
        .map(|_| device.create_stream().expect("the host has streams"))
        .collect();
    let mut live = HashMap::new();
    criterion.bench_function("pool/replay/tiny", |bencher| {
        bencher.iter(|| play(&pool, &streams, &events, &mut live));
    });
}

criterion_group!(benches, replay);
criterion_main!(benches);
