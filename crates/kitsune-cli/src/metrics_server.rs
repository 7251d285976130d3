//! The metrics endpoint: what the library publishes, in Prometheus text format over HTTP.

use std::io::{self, Write};
use std::net::TcpListener;

use metrics_exporter_prometheus::PrometheusBuilder;

use crate::failure::Failure;

/// Serves `http://<address>/metrics` until the process ends, and says so on standard error. The host may be a name:
/// the first of its addresses that can be had is taken. Port 0 takes any free port.
///
/// Metrics registered before this call are lost: a recorder has no past.
pub(crate) fn start(address: &str) -> Result<(), Failure> {
    // Binding here first gives the system's own reason, and turns port 0 into a number that can be told.
    let bound = TcpListener::bind(address).and_then(|listener| listener.local_addr());
    let bound = bound.map_err(|error| Failure::Input(format!("--metrics {address}: {error}")))?;
    PrometheusBuilder::new()
        .with_recommended_naming(true)
        .with_http_listener(bound)
        .install()
        .map_err(|error| Failure::Run(format!("--metrics {bound}: {error}")))?;
    // Telling is a courtesy: the endpoint works without.
    let _ = writeln!(io::stderr(), "metrics: http://{bound}/metrics");
    Ok(())
}
