//! Metrics as Prometheus reads them.

mod metrics;
