//! What is published, as Prometheus would read it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kitsune::amp::fp8::{Fp8Config, Fp8Scaler};
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
        telemetry::publish(&pool);
        telemetry::publish_fp8(&fp8(&[1.0])).unwrap();
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
