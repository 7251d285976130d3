//! Names of tags made at run time: kept once, by any thread, and 4,096 of them in a process.
//!
//! One test, since names are the process's and none of them is ever free again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support::process;
use std::sync::Barrier;
use std::thread;

use kitsune::memory::tag;
use kitsune::{Block, Device, HostConfig, Pool, PoolConfig, Stream};

const THREADS: usize = 8;

fn tagged(pool: &Pool, stream: &Stream, name: &str) -> Block {
    let _scope = tag(name);
    pool.allocate(512, stream).unwrap()
}

/// Live bytes under `name`; `None` if the pool knows no such tag.
fn bytes(pool: &Pool, name: &str) -> Option<u64> {
    let stats = pool.tag_stats();
    let mut found = stats.iter().filter(|stat| stat.tag == name);
    let bytes = found.next().map(|stat| stat.allocated_bytes.current);
    assert!(found.next().is_none(), "`{name}` is there twice");
    bytes
}

#[test]
fn the_first_4096_names_count_by_themselves_and_the_rest_together() {
    process::alone(
        process::test_name!("the_first_4096_names_count_by_themselves_and_the_rest_together"),
        || {
            let device = Device::host(HostConfig::default()).unwrap();
            let pool = Pool::new(&device, PoolConfig::default()).unwrap();
            let stream = device.create_stream().unwrap();
            let long = "x".repeat(100_000);
            let mut kept = vec![
                tagged(&pool, &stream, ""),
                tagged(&pool, &stream, &long),
                tagged(&pool, &stream, "static"),
            ];
            let same = String::from("static");
            {
                let _scope = tag(same);
                kept.push(pool.allocate(512, &stream).unwrap());
            }
            assert_eq!(bytes(&pool, "untagged"), Some(512));
            assert_eq!(bytes(&pool, &long), Some(512));
            assert_eq!(bytes(&pool, "static"), Some(1024));
            assert_eq!(bytes(&pool, ""), None);

            // All threads at once, each in an order of its own, until two are missing to 4,096.
            let names: Vec<String> = (0..4092).map(|layer| format!("layer.{layer}")).collect();
            let together = Barrier::new(THREADS);
            thread::scope(|scope| {
                for first in 0..THREADS {
                    let (names, pool, stream, together) = (&names, &pool, &stream, &together);
                    scope.spawn(move || {
                        together.wait();
                        for at in 0..names.len() {
                            let at = (at + first * names.len() / THREADS) % names.len();
                            drop(tagged(pool, stream, &names[at]));
                        }
                    });
                }
            });
            let held: Vec<Block> = names
                .iter()
                .map(|name| tagged(&pool, &stream, name))
                .collect();
            let stats = pool.tag_stats();
            assert_eq!(stats.len(), 4092 + 3, "with `untagged` and two before");
            for name in &names {
                let stat = stats.iter().find(|stat| stat.tag == name).unwrap();
                assert_eq!(stat.allocated_bytes.current, 512, "{name}");
                assert_eq!(stat.allocated_bytes.allocated, 512 * (THREADS as u64 + 1));
            }

            for name in ["the 4,095th", "the 4,096th"] {
                kept.push(tagged(&pool, &stream, name));
                assert_eq!(bytes(&pool, name), Some(512));
            }
            assert_eq!(bytes(&pool, "other"), None);
            for (count, name) in [(1, "the 4,097th"), (2, "the 4,098th"), (3, "other")] {
                kept.push(tagged(&pool, &stream, name));
                assert_eq!(bytes(&pool, "other"), Some(count * 512), "{name}");
            }
            assert_eq!(bytes(&pool, "the 4,097th"), None);
            assert_eq!(bytes(&pool, "static"), Some(1024));
            drop((kept, held));
            pool.check_invariants();
        },
    );
}
