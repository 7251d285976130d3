//! The metrics endpoint: serves the library's metrics in Prometheus text format over HTTP.

use std::io::{self, Write};
use std::net::TcpListener;

use metrics_exporter_prometheus::PrometheusBuilder;

use crate::failure::Failure;

/// Serves `http://<address>/metrics` until the process ends, and prints the address on standard error. If the host is a
/// name, uses the first of its addresses that can be bound. Port 0 selects any free port.
///
/// Metrics registered before this call are lost, because no recorder was installed.
pub(crate) fn start(address: &str) -> Result<(), Failure> {
    // Binding here first yields the system's error message, and resolves port 0 to the port to print.
    let bound = TcpListener::bind(address).and_then(|listener| listener.local_addr());
    let bound = bound.map_err(|error| Failure::Input(format!("--metrics {address}: {error}")))?;
    PrometheusBuilder::new()
        .with_recommended_naming(true)
        .with_http_listener(bound)
        .install()
        .map_err(|error| Failure::Run(format!("--metrics {bound}: {error}")))?;
    // The endpoint works even if this message cannot be written.
    let _ = writeln!(io::stderr(), "metrics: http://{bound}/metrics");
    Ok(())
}
