//! What is published, as Prometheus would read it. Names belong to the process: each test has its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kitsune::amp::fp8::{Fp8Config, Fp8Scaler};
use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, Device, HostConfig, Pool, PoolConfig, Tensor, memory, telemetry};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

fn recorder() -> (PrometheusRecorder, PrometheusHandle) {
    let recorder = PrometheusBuilder::new()
        .with_recommended_naming(true)
        .build_recorder();
    let handle = recorder.handle();
    (recorder, handle)
}

fn pool() -> Pool {
    let device = Device::host(HostConfig::default()).unwrap();
    Pool::new(&device, PoolConfig::default()).unwrap()
}

/// The value that `text` gives for `series`, a name with its labels.
fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series));
    let value = line.unwrap_or_else(|| panic!("no {series} in\n{text}"));
    value.trim().parse().unwrap()
}

#[test]
fn a_pool_is_published_as_it_is() {
    let (recorder, handle) = recorder();
    let pool = pool();
    let stream = pool.device().create_stream().unwrap();
    metrics::with_local_recorder(&recorder, || {
        telemetry::describe();
        let scope = memory::tag("weights");
        let block = pool.allocate(1000, &stream).unwrap();
        drop(scope);
        telemetry::publish(&pool);
        let text = handle.render();
        let labels = "{device=\"host:0\",pool=\"default\"}";
        let stats = pool.stats();
        for (name, expected) in [
            ("requested_bytes", 1000),
            ("allocated_bytes", 1024),
            ("active_bytes", 1024),
            ("reserved_bytes", stats.reserved_bytes.current),
            ("requested_peak_bytes", 1000),
            ("blocks", 1),
            ("allocations_total", 1),
            ("frees_total", 0),
            ("ooms_total", 0),
            ("driver_allocs_total", stats.num_device_alloc),
        ] {
            let series = format!("kitsune_pool_{name}{labels}");
            assert_eq!(value(&text, &series), expected as f64, "{name}");
        }
        let series =
            "kitsune_tag_allocated_bytes{device=\"host:0\",pool=\"default\",tag=\"weights\"}";
        assert_eq!(value(&text, series), 1024.0);

        drop(block);
        telemetry::publish(&pool);
        telemetry::publish(&pool);
        let text = handle.render();
        let series = |name: &str| format!("kitsune_pool_{name}{labels}");
        assert_eq!(value(&text, &series("requested_bytes")), 0.0);
        assert_eq!(value(&text, &series("requested_peak_bytes")), 1000.0);
        // Publishing again counts nothing again.
        assert_eq!(value(&text, &series("allocations_total")), 1.0);
        assert_eq!(value(&text, &series("frees_total")), 1.0);
    });
}

#[test]
fn pools_have_names() {
    let (recorder, handle) = recorder();
    let (small, large) = (pool(), pool());
    let stream = large.device().create_stream().unwrap();
    metrics::with_local_recorder(&recorder, || {
        let _block = large.allocate(4096, &stream).unwrap();
        telemetry::publish_as(&small, "small");
        telemetry::publish_as(&large, "large");
        let text = handle.render();
        let series = |pool: &str| {
            format!("kitsune_pool_requested_bytes{{device=\"host:0\",pool=\"{pool}\"}}")
        };
        assert_eq!(value(&text, &series("small")), 0.0);
        assert_eq!(value(&text, &series("large")), 4096.0);
    });
}

/// A scaler of two tensors, one of which was converted.
fn fp8(values: &[f32]) -> Fp8Scaler {
    let context = Context::with_pool(&pool()).unwrap();
    let tensors = [("x", DType::F8E4M3), ("y", DType::F8E5M2)];
    let mut scaler = Fp8Scaler::new(&context, Fp8Config::default(), &tensors).unwrap();
    let x = Tensor::from_slice(&context, [values.len()], values).unwrap();
    scaler.quantize("x", &x).unwrap();
    scaler.update().unwrap();
    scaler
}

#[test]
fn tensors_of_8_bits_are_published_as_they_are() {
    let (recorder, handle) = recorder();
    metrics::with_local_recorder(&recorder, || {
        telemetry::describe();
        // Two that are too large, two that vanish.
        let scaler = fp8(&[1000.0, -500.0, 2.0, 1e-5, -1e-6, 0.0]);
        telemetry::publish_fp8(&scaler).unwrap();
        telemetry::publish_fp8(&scaler).unwrap();
        telemetry::publish_fp8_as(&fp8(&[f32::NAN, 1.0, 1.0]), "other").unwrap();
        let text = handle.render();
        let of = |scaler: &str, tensor: &str, name: &str| {
            let labels = format!("{{scaler=\"{scaler}\",tensor=\"{tensor}\"}}");
            value(&text, &format!("kitsune_fp8_{name}{labels}"))
        };
        let stats = &scaler.stats().unwrap().tensors[0];
        for (name, expected) in [
            ("scale", f64::from(stats.scale)),
            ("amax", 1000.0),
            ("elements_total", 6.0),
            ("overflowed_elements_total", 2.0),
            ("vanished_elements_total", 2.0),
            ("nan_elements_total", 0.0),
            ("scale_updates_total", 1.0),
            ("not_finite_updates_total", 0.0),
        ] {
            assert_eq!(of("default", "x", name), expected, "{name}");
        }
        assert_eq!(of("default", "y", "elements_total"), 0.0);
        assert_eq!(of("other", "x", "nan_elements_total"), 1.0);
        assert_eq!(of("other", "x", "not_finite_updates_total"), 1.0);
    });
}

#[test]
fn every_metric_is_described_and_well_named() {
    let (recorder, handle) = recorder();
    let pool = pool();
    metrics::with_local_recorder(&recorder, || {
        telemetry::describe();
        telemetry::publish_as(&pool, "described");
        telemetry::publish_scaler_as(&trained(1).0, "described").unwrap();
        telemetry::publish_fp8_as(&fp8(&[1.0]), "described").unwrap();
    });
    let text = handle.render();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let types: Vec<_> = types.map(|line| line.split_once(' ').unwrap()).collect();
    assert!(types.len() > 25, "{text}");
    for (name, kind) in types {
        assert!(
            text.contains(&format!("# HELP {name} ")),
            "{name} has no help"
        );
        assert!(name.starts_with("kitsune_"), "{name}");
        assert_eq!(
            name.ends_with("_total"),
            kind == "counter",
            "{name} is a {kind}"
        );
        assert_eq!(
            name.matches("bytes").count(),
            usize::from(name.contains("bytes")),
            "{name}"
        );
        assert!(
            !text.contains(&format!("{name}{{}}")),
            "{name} has no labels"
        );
    }
}

/// A scaler after so many steps, and the optimizer that it drove.
fn trained(steps: u64) -> (GradScaler, Sgd) {
    let context = Context::with_pool(&pool()).unwrap();
    let weight = Tensor::zeros(&context, [2], DType::F32).unwrap();
    let weight = Parameter::new("w", weight).unwrap();
    let mut optimizer = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
    let mut scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
    step(&mut scaler, &mut optimizer, &weight, steps);
    (scaler, optimizer)
}

fn step(scaler: &mut GradScaler, optimizer: &mut Sgd, weight: &Parameter, steps: u64) {
    let context = weight.value().context().clone();
    for _ in 0..steps {
        let zeros = |shape: &[usize]| Tensor::zeros(&context, shape, DType::F32).unwrap();
        scaler.scale(&zeros(&[])).unwrap();
        weight.set_grad(zeros(&[2])).unwrap();
        let _ = scaler.step(optimizer).unwrap();
        scaler.update().unwrap();
    }
}

/// A pool that has served so many blocks of 1 KiB under `tag`, all of them freed.
fn used(blocks: u64, tag: &'static str) -> Pool {
    let pool = pool();
    let stream = pool.device().create_stream().unwrap();
    let _scope = memory::tag(tag);
    for _ in 0..blocks {
        drop(pool.allocate(1024, &stream).unwrap());
    }
    pool
}

fn of_pool(name: &str, metric: &str) -> String {
    format!("kitsune_{metric}{{device=\"host:0\",pool=\"{name}\"}}")
}

fn of_scaler(name: &str, metric: &str) -> String {
    format!("kitsune_{metric}{{scaler=\"{name}\"}}")
}

#[test]
fn a_name_that_is_used_again_goes_on_from_the_sum() {
    let (recorder, handle) = recorder();
    metrics::with_local_recorder(&recorder, || {
        let mut sums = (0, 0, 0);
        for uses in [10, 4, 7] {
            let pool = used(uses, "again");
            let (scaler, _optimizer) = trained(uses);
            let fp8 = fp8(&vec![1.0; usize::try_from(uses).unwrap()]);
            // A holder counts once, however often it is published.
            for _ in 0..2 {
                telemetry::publish_as(&pool, "again");
                telemetry::publish_scaler_as(&scaler, "again").unwrap();
                telemetry::publish_fp8_as(&fp8, "again").unwrap();
            }
            sums = (sums.0 + uses, sums.1 + uses, sums.2 + uses);
            let text = handle.render();
            let allocations = value(&text, &of_pool("again", "pool_allocations_total"));
            let steps = value(&text, &of_scaler("again", "amp_steps_total"));
            let elements = "kitsune_fp8_elements_total{scaler=\"again\",tensor=\"x\"}";
            let found = (allocations, steps, value(&text, elements));
            assert_eq!(found, (sums.0 as f64, sums.1 as f64, sums.2 as f64));
            // Gauges are those of the last one alone.
            let reserved = pool.stats().reserved_bytes.current as f64;
            assert_eq!(
                value(&text, &of_pool("again", "pool_reserved_bytes")),
                reserved
            );
            assert_eq!(value(&text, &of_scaler("again", "amp_scale")), 65536.0);
            assert_eq!(value(&text, &of_pool("again", "pool_up")), 1.0);
            assert_eq!(value(&text, &of_scaler("again", "amp_up")), 1.0);
        }
    });
}

#[test]
fn gauges_of_what_is_gone_are_0_with_the_next_call_for_anything() {
    let (recorder, handle) = recorder();
    let other = pool();
    let (other_scaler, _optimizer) = trained(1);
    let other_fp8 = fp8(&[1.0]);
    let calls: [(&str, &dyn Fn()); 4] = [
        ("gone-pool", &|| telemetry::publish_as(&other, "other")),
        ("gone-amp", &|| {
            telemetry::publish_scaler_as(&other_scaler, "other").unwrap();
        }),
        ("gone-fp8", &|| {
            telemetry::publish_fp8_as(&other_fp8, "other-fp8").unwrap();
        }),
        ("gone-sweep", &telemetry::sweep),
    ];
    metrics::with_local_recorder(&recorder, || {
        for (name, call) in calls {
            let (pool, fp8) = (used(3, "gone"), fp8(&[1000.0]));
            let (scaler, optimizer) = trained(2);
            telemetry::publish_as(&pool, name);
            telemetry::publish_scaler_as(&scaler, name).unwrap();
            telemetry::publish_fp8_as(&fp8, name).unwrap();
            let tag = format!("{{device=\"host:0\",pool=\"{name}\",tag=\"gone\"}}");
            let tensor = format!("{{scaler=\"{name}\",tensor=\"x\"}}");
            let gauges = [
                of_pool(name, "pool_up"),
                of_pool(name, "pool_reserved_bytes"),
                of_pool(name, "pool_allocated_peak_bytes"),
                format!("kitsune_tag_allocated_peak_bytes{tag}"),
                of_scaler(name, "amp_up"),
                of_scaler(name, "amp_scale"),
                of_scaler(name, "amp_scratch_bytes"),
                of_scaler(name, "fp8_up"),
                format!("kitsune_fp8_scale{tensor}"),
                format!("kitsune_fp8_amax{tensor}"),
            ];
            let text = handle.render();
            for gauge in &gauges {
                assert!(value(&text, gauge) > 0.0, "{name}: {gauge}");
            }
            // The optimizer, which knows its scaler, stays: the scaler is gone all the same.
            drop((pool, scaler, fp8));
            call();
            let text = handle.render();
            for gauge in &gauges {
                assert_eq!(value(&text, gauge), 0.0, "{name}: {gauge}");
            }
            assert_eq!(value(&text, &of_pool(name, "pool_allocations_total")), 3.0);
            assert_eq!(value(&text, &of_scaler(name, "amp_steps_total")), 2.0);
            drop(optimizer);
        }
    });
}

#[test]
fn a_pool_lives_as_long_as_a_clone_of_it() {
    let (recorder, handle) = recorder();
    metrics::with_local_recorder(&recorder, || {
        let pool = used(2, "clones");
        let clone = pool.clone();
        telemetry::publish_as(&pool, "clones");
        drop(pool);
        telemetry::sweep();
        let up = of_pool("clones", "pool_up");
        assert_eq!(value(&handle.render(), &up), 1.0);
        // The same pool: nothing counts again.
        telemetry::publish_as(&clone, "clones");
        let allocations = of_pool("clones", "pool_allocations_total");
        assert_eq!(value(&handle.render(), &allocations), 2.0);
        drop(clone);
        telemetry::sweep();
        assert_eq!(value(&handle.render(), &up), 0.0);
    });
}

#[test]
fn living_holders_of_one_name_add_up() {
    let (recorder, handle) = recorder();
    metrics::with_local_recorder(&recorder, || {
        let (small, large) = (used(2, "twins"), used(5, "twins"));
        let stream = small.device().create_stream().unwrap();
        let block = small.allocate(4096, &stream).unwrap();
        telemetry::publish_as(&small, "twins");
        telemetry::publish_as(&large, "twins");
        let of = |name| value(&handle.render(), &of_pool("twins", name));
        let reserved = |pool: &Pool| pool.stats().reserved_bytes.current as f64;
        assert_eq!(of("pool_allocations_total"), 8.0);
        assert_eq!(of("pool_allocated_bytes"), 4096.0);
        assert_eq!(
            of("pool_reserved_bytes"),
            reserved(&small) + reserved(&large)
        );
        assert_eq!(of("pool_up"), 1.0);
        drop((block, small));
        telemetry::publish_as(&large, "twins");
        assert_eq!(of("pool_allocations_total"), 8.0);
        assert_eq!(of("pool_allocated_bytes"), 0.0);
        assert_eq!(of("pool_reserved_bytes"), reserved(&large));
        assert_eq!(of("pool_up"), 1.0);
    });
}

#[test]
fn a_recorder_that_comes_later_gets_the_totals() {
    // Before there is any recorder.
    telemetry::publish_as(&used(3, "late"), "late");
    let gone = used(6, "late");
    telemetry::publish_as(&gone, "late-gone");
    drop(gone);
    let pool = used(4, "late");
    telemetry::publish_as(&pool, "late");
    for _ in 0..2 {
        let (recorder, handle) = recorder();
        metrics::with_local_recorder(&recorder, || telemetry::publish_as(&pool, "late"));
        let text = handle.render();
        let of = |name| value(&text, &of_pool(name, "pool_allocations_total"));
        assert_eq!((of("late"), of("late-gone")), (7.0, 6.0));
        assert_eq!(value(&text, &of_pool("late", "pool_up")), 1.0);
        assert_eq!(value(&text, &of_pool("late-gone", "pool_up")), 0.0);
    }
}

#[test]
fn a_restored_scaler_goes_on_counting() {
    let (recorder, handle) = recorder();
    metrics::with_local_recorder(&recorder, || {
        let saved = trained(1).0.state_dict().unwrap();
        let (mut scaler, _optimizer) = trained(5);
        let mut steps = Vec::new();
        for _ in 0..2 {
            telemetry::publish_scaler_as(&scaler, "restored").unwrap();
            let series = of_scaler("restored", "amp_steps_total");
            steps.push(value(&handle.render(), &series));
            scaler.load_state_dict(&saved).unwrap();
        }
        assert_eq!(steps, [5.0, 5.0]);
    });
}

#[test]
fn threads_that_publish_at_once_lose_nothing_and_never_go_back() {
    const ROUNDS: u64 = 40;
    let (recorder, handle) = recorder();
    let shared = used(0, "threads");
    let is_over = AtomicBool::new(false);
    let series = of_pool("threads", "pool_allocations_total");
    thread::scope(|scope| {
        let publishers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let _guard = metrics::set_default_local_recorder(&recorder);
                    let stream = shared.device().create_stream().unwrap();
                    for round in 0..ROUNDS {
                        drop(shared.allocate(1024, &stream).unwrap());
                        telemetry::publish_as(&shared, "threads");
                        // One that is gone at once.
                        telemetry::publish_as(&used(round % 2, "threads"), "threads");
                    }
                })
            })
            .collect();
        let watcher = scope.spawn(|| {
            let mut last = 0.0;
            while !is_over.load(Ordering::Relaxed) {
                let text = handle.render();
                if text.contains(&series) {
                    let now = value(&text, &series);
                    assert!(now >= last, "{now} after {last}");
                    last = now;
                }
            }
        });
        for publisher in publishers {
            publisher.join().unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        watcher.join().unwrap();
    });
    metrics::with_local_recorder(&recorder, telemetry::sweep);
    let expected = 3 * (ROUNDS + ROUNDS / 2);
    let text = handle.render();
    assert_eq!(value(&text, &series), expected as f64);
    let requested = of_pool("threads", "pool_requested_bytes");
    assert_eq!(value(&text, &requested), 0.0);
}
