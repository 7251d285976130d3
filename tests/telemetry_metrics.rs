//! What is published, as Prometheus would read it.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kitsune::{Device, HostConfig, Pool, PoolConfig, memory, telemetry};
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

#[test]
fn every_metric_is_described_and_well_named() {
    let (recorder, handle) = recorder();
    let pool = pool();
    metrics::with_local_recorder(&recorder, || {
        telemetry::describe();
        telemetry::publish(&pool);
    });
    let text = handle.render();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let types: Vec<_> = types.map(|line| line.split_once(' ').unwrap()).collect();
    assert!(types.len() > 15, "{text}");
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
