//! The result of a replay, as a table and as JSON.

use kitsune::units::Bytes;
use serde::Serialize;

use crate::summary::table;

/// The result. The field names are the keys of the JSON output, which is part of the command's interface.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Figures {
    /// Name of the device.
    pub(crate) device: String,
    /// Host threads that made calls.
    pub(crate) host_threads: u64,
    /// Steps in one pass, by the marks of the trace.
    pub(crate) steps: u64,
    /// Allocations in one pass.
    pub(crate) allocs: u64,
    /// Peak of the bytes live at once, as requested.
    pub(crate) peak_requested_bytes: u64,
    /// Peak of the bytes that the pool held.
    pub(crate) peak_reserved_bytes: u64,
    /// Peak reserved over peak requested; `null` if nothing was requested.
    pub(crate) ratio: Option<f64>,
    /// Median time of a pass, divided by the allocations of the thread that has the most; `null` without allocations.
    pub(crate) ns_per_pair: Option<f64>,
    /// Driver calls that allocated memory in the first pass.
    pub(crate) driver_allocs: u64,
    /// Driver calls about memory in the second pass.
    pub(crate) driver_calls_steady: u64,
    /// Driver calls about memory per pass of the last repeat; `null` without allocations.
    pub(crate) driver_calls_settled: Option<f64>,
    /// Pages of 2 MiB that the first pass mapped, whatever the size of the handles.
    pub(crate) pages_mapped_first: u64,
    /// Pages mapped per step, the mean of the timed repeats; a pass without marks counts as one step. `null` without
    /// allocations.
    pub(crate) pages_mapped_per_step: Option<f64>,
    /// Pages mapped per step in the second half of the first pass; `null` without steps.
    pub(crate) pages_mapped_per_step_late: Option<f64>,
    /// Mapping calls in the first pass, each of one or several handles.
    pub(crate) map_calls_first: u64,
    /// Time that the driver calls of the first pass take by the price list, in milliseconds.
    pub(crate) driver_ms_first: f64,
    /// The same per step, the mean of the timed repeats; `null` without allocations.
    pub(crate) driver_ms_per_step: Option<f64>,
    /// Events that the pool recorded in the first pass.
    pub(crate) events_recorded: u64,
    /// How often the pool made the host wait for streams in the first pass.
    pub(crate) host_syncs: u64,
    /// Allocations of the first pass that ran out of memory.
    pub(crate) ooms: u64,
    /// The same work on the system's allocator, for `churn`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) malloc_ns_per_pair: Option<Option<f64>>,
    /// A digest of the addresses of all blocks, in deterministic mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) address_digest: Option<String>,
    /// Whether every block was written, read back and found intact; `false` without `--check`. A block that was not
    /// intact ends the run with an error.
    pub(crate) checked: bool,
    /// The smallest device on which the trace passes, with `--min-device`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) min_device_bytes: Option<u64>,
    /// All timed passes, in ns per pair, in ascending order.
    #[serde(skip)]
    pub(crate) times: Vec<f64>,
}

impl Figures {
    /// One JSON object on one line.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a struct of numbers is always JSON")
    }

    /// A table for display.
    pub(crate) fn to_table(&self) -> String {
        let ratio = self
            .ratio
            .map_or(String::new(), |ratio| format!(", {ratio:.3} times as much"));
        let settled = self.driver_calls_settled.map_or(String::new(), |calls| {
            format!(", {calls:.1} per pass in the last repeat")
        });
        let mut rows = vec![
            ("device", self.device.clone()),
            ("allocations", format!("{} per pass", self.allocs)),
            (
                "peak requested",
                Bytes(self.peak_requested_bytes).to_string(),
            ),
            (
                "peak reserved",
                format!("{}{ratio}", Bytes(self.peak_reserved_bytes)),
            ),
            ("time per pair", self.time()),
        ];
        if let Some(malloc) = self.malloc_ns_per_pair {
            let time = malloc.map_or("none: it ran out of memory".to_owned(), nanoseconds);
            rows.push(("malloc, same work", time));
        }
        rows.extend([
            (
                "driver calls",
                format!(
                    "{} allocations in the first pass, {} memory calls in the second{settled}",
                    self.driver_allocs, self.driver_calls_steady
                ),
            ),
            ("pages mapped", self.pages_mapped()),
            ("driver time", self.driver_time()),
            ("events recorded", self.events_recorded.to_string()),
            ("host waits", self.host_syncs.to_string()),
            ("out of memory", format!("{} allocations", self.ooms)),
        ]);
        if let Some(digest) = &self.address_digest {
            rows.push(("addresses", format!("digest {digest}")));
        }
        if let Some(bytes) = self.min_device_bytes {
            rows.push((
                "smallest device",
                format!("{} ({bytes} bytes)", Bytes(bytes)),
            ));
        }
        if self.checked {
            rows.push(("check", "all blocks kept their contents".to_owned()));
        }
        table(&rows)
    }

    fn pages_mapped(&self) -> String {
        let late = self
            .pages_mapped_per_step_late
            .map_or(String::new(), |pages| {
                format!(" ({pages:.1} per step in its second half)")
            });
        let warm = self.pages_mapped_per_step.map_or(String::new(), |pages| {
            format!(", {pages:.1} per step once warm")
        });
        format!("{} in the first pass{late}{warm}", self.pages_mapped_first)
    }

    fn driver_time(&self) -> String {
        let warm = self.driver_ms_per_step.map_or(String::new(), |time| {
            format!(", {time:.3} ms per step once warm")
        });
        format!("{:.1} ms in the first pass{warm}", self.driver_ms_first)
    }

    fn time(&self) -> String {
        match (self.times.as_slice(), self.ns_per_pair) {
            ([least, .., most], Some(median)) => format!(
                "{} (from {} to {}, {} repeats)",
                nanoseconds(median),
                nanoseconds(*least),
                nanoseconds(*most),
                self.times.len()
            ),
            (_, Some(median)) => nanoseconds(median),
            (_, None) => "none: there are no allocations".to_owned(),
        }
    }
}

fn nanoseconds(time: f64) -> String {
    format!("{time:.1} ns")
}

/// The median of numbers in ascending order.
pub(crate) fn median(ascending: &[f64]) -> Option<f64> {
    let middle = ascending.len() / 2;
    match ascending.len() {
        0 => None,
        len if len % 2 == 1 => Some(ascending[middle]),
        _ => Some((ascending[middle - 1] + ascending[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[1.0, 5.0, 100.0]), Some(5.0));
        assert_eq!(median(&[1.0, 5.0, 7.0, 100.0]), Some(6.0));
    }

    #[test]
    fn the_table_reads() {
        let figures = Figures {
            device: "host".to_owned(),
            allocs: 3,
            peak_requested_bytes: 1 << 20,
            peak_reserved_bytes: 2 << 20,
            ratio: Some(2.0),
            ns_per_pair: Some(45.25),
            driver_allocs: 1,
            driver_calls_settled: Some(0.5),
            pages_mapped_first: 7,
            pages_mapped_per_step_late: Some(1.5),
            pages_mapped_per_step: Some(0.25),
            driver_ms_first: 12.345,
            driver_ms_per_step: Some(0.02),
            address_digest: Some("00ff00ff00ff00ff".to_owned()),
            malloc_ns_per_pair: Some(None),
            min_device_bytes: Some(1 << 21),
            times: vec![40.0, 45.25, 90.0],
            checked: true,
            ..Figures::default()
        };
        let expected = "\
device             host
allocations        3 per pass
peak requested     1.0 MiB
peak reserved      2.0 MiB, 2.000 times as much
time per pair      45.2 ns (from 40.0 ns to 90.0 ns, 3 repeats)
malloc, same work  none: it ran out of memory
driver calls       1 allocations in the first pass, 0 memory calls in the second, 0.5 per pass in the last repeat
pages mapped       7 in the first pass (1.5 per step in its second half), 0.2 per step once warm
driver time        12.3 ms in the first pass, 0.020 ms per step once warm
events recorded    0
host waits         0
out of memory      0 allocations
addresses          digest 00ff00ff00ff00ff
smallest device    2.0 MiB (2097152 bytes)
check              all blocks kept their contents
";
        assert_eq!(figures.to_table(), expected);
    }

    #[test]
    fn json_has_the_keys_that_were_asked_for() {
        let json = Figures::default().to_json();
        assert!(
            json.contains("\"ratio\":null")
                && !json.contains("malloc")
                && !json.contains("address"),
            "{json}"
        );
        let churn = Figures {
            malloc_ns_per_pair: Some(None),
            ..Figures::default()
        };
        assert!(churn.to_json().contains("\"malloc_ns_per_pair\":null"));
    }
}
