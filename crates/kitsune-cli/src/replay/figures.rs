//! What a replay came to, for people and for programs.

use kitsune::units::Bytes;
use serde::Serialize;

use crate::summary::table;

/// The result. The names are those of the JSON output and part of the program's interface.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Figures {
    /// Name of the device.
    pub(crate) device: String,
    /// Allocations of one pass.
    pub(crate) allocs: u64,
    /// Most bytes that were live at once, as requested.
    pub(crate) peak_requested_bytes: u64,
    /// Most bytes that the pool held.
    pub(crate) peak_reserved_bytes: u64,
    /// Peak reserved by peak requested; `null` where nothing was requested.
    pub(crate) ratio: Option<f64>,
    /// Median time of a pass by the allocations of the thread that has most of them; `null` without any.
    pub(crate) ns_per_pair: Option<f64>,
    /// Calls that took memory from the driver in the first pass.
    pub(crate) driver_allocs: u64,
    /// Calls to the driver about memory in the second pass.
    pub(crate) driver_calls_steady: u64,
    /// The same in the last repeat, for each of its passes; `null` without allocations.
    pub(crate) driver_calls_settled: Option<f64>,
    /// Events that the pool recorded in the first pass.
    pub(crate) events_recorded: u64,
    /// Times that the pool made the host wait for streams in the first pass.
    pub(crate) host_syncs: u64,
    /// Allocations of the first pass that found no room.
    pub(crate) ooms: u64,
    /// The same work on the system's allocator, for `churn`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) malloc_ns_per_pair: Option<Option<f64>>,
    /// What stands for the addresses of all blocks, in deterministic mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) address_digest: Option<String>,
    /// Whether every block was written and read back, and was found as it should be: `false` where nobody asked for
    /// it. One that was not ends the run with an error.
    pub(crate) checked: bool,
    /// Smallest device on which the trace passes, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) min_device_bytes: Option<u64>,
    /// All timed passes, in ns a pair, in ascending order.
    #[serde(skip)]
    pub(crate) times: Vec<f64>,
}

impl Figures {
    /// One JSON object on one line.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a struct of numbers is always JSON")
    }

    /// A table for people.
    pub(crate) fn to_table(&self) -> String {
        let ratio = self
            .ratio
            .map_or(String::new(), |ratio| format!(", {ratio:.3} times as much"));
        let settled = self.driver_calls_settled.map_or(String::new(), |calls| {
            format!(", {calls:.1} a pass in the last repeat")
        });
        let mut rows = vec![
            ("device", self.device.clone()),
            ("allocations", format!("{} a pass", self.allocs)),
            (
                "peak requested",
                Bytes(self.peak_requested_bytes).to_string(),
            ),
            (
                "peak reserved",
                format!("{}{ratio}", Bytes(self.peak_reserved_bytes)),
            ),
            ("time a pair", self.time()),
        ];
        if let Some(malloc) = self.malloc_ns_per_pair {
            let time = malloc.map_or("none: it ran out of memory".to_owned(), nanoseconds);
            rows.push(("malloc, same work", time));
        }
        rows.extend([
            (
                "driver calls",
                format!(
                    "{} allocations in the first pass, {} calls about memory in the second{settled}",
                    self.driver_allocs, self.driver_calls_steady
                ),
            ),
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
            (_, None) => "none: nothing is allocated".to_owned(),
        }
    }
}

fn nanoseconds(time: f64) -> String {
    format!("{time:.1} ns")
}

/// The middle of numbers in ascending order; of an even count, the mean of the two in the middle.
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
            address_digest: Some("00ff00ff00ff00ff".to_owned()),
            malloc_ns_per_pair: Some(None),
            min_device_bytes: Some(1 << 21),
            times: vec![40.0, 45.25, 90.0],
            checked: true,
            ..Figures::default()
        };
        let expected = "\
device             host
allocations        3 a pass
peak requested     1.0 MiB
peak reserved      2.0 MiB, 2.000 times as much
time a pair        45.2 ns (from 40.0 ns to 90.0 ns, 3 repeats)
malloc, same work  none: it ran out of memory
driver calls       1 allocations in the first pass, 0 calls about memory in the second, 0.5 a pass in the last repeat
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
