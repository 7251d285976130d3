//! What driver calls cost on a GPU, so that a replay over the host device can say what a program would pay.
//!
//! The defaults come from published measurements of CUDA's virtual memory calls. `scripts/gpu/check` measures the prices
//! of its machine and writes them in this format.

use std::path::Path;

use kitsune::units::MIB;
use serde::{Deserialize, Serialize};

use super::probe::Calls;
use crate::failure::Failure;

/// The price of each kind of driver call, in microseconds. The field names are the keys of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Prices {
    /// Creating a handle of physical memory.
    create_us: f64,
    /// Each MiB of a new handle.
    create_us_per_mib: f64,
    /// Mapping a handle.
    map_us: f64,
    /// Setting the access of a range, once per mapping call.
    set_access_us: f64,
    /// Each handle in that range.
    set_access_us_per_handle: f64,
    /// Unmapping a handle.
    unmap_us: f64,
    /// Destroying a handle.
    release_us: f64,
    /// A plain allocation.
    malloc_us: f64,
    event_create_us: f64,
    event_record_us: f64,
    event_query_us: f64,
    /// Making a stream wait for an event.
    event_wait_us: f64,
    /// Blocking the host until a stream or an event is complete.
    synchronize_us: f64,
}

impl Default for Prices {
    fn default() -> Self {
        Self {
            create_us: 29.0,
            create_us_per_mib: 1.0,
            map_us: 2.0,
            set_access_us: 20.0,
            set_access_us_per_handle: 5.0,
            unmap_us: 34.0,
            release_us: 23.0,
            malloc_us: 300.0,
            event_create_us: 0.5,
            event_record_us: 1.0,
            event_query_us: 0.5,
            event_wait_us: 1.0,
            synchronize_us: 5.0,
        }
    }
}

impl Prices {
    /// Reads a price list. Keys that it lacks have the default price.
    ///
    /// # Errors
    /// [`Failure::Input`] for a file that cannot be read, is no price list, or has a price below zero.
    pub(crate) fn read(file: &Path) -> Result<Self, Failure> {
        let refuse = |reason: String| Failure::Input(format!("{}: {reason}", file.display()));
        let text = std::fs::read_to_string(file).map_err(|error| refuse(error.to_string()))?;
        Self::parse(&text).map_err(refuse)
    }

    fn parse(text: &str) -> Result<Self, String> {
        // A struct would also be read from an array.
        let keys: serde_json::Map<_, _> =
            serde_json::from_str(text).map_err(|error| error.to_string())?;
        let prices: Self =
            serde_json::from_value(keys.into()).map_err(|error| error.to_string())?;
        let written = serde_json::to_value(&prices).expect("a struct of numbers is always JSON");
        let keys = written.as_object().into_iter().flatten();
        for (key, price) in keys {
            if price.as_f64().is_none_or(|price| price < 0.0) {
                return Err(format!("{key} must not be negative"));
            }
        }
        Ok(prices)
    }

    /// The price of all `calls`, in milliseconds.
    pub(crate) fn milliseconds(&self, calls: &Calls) -> f64 {
        let priced = [
            (self.create_us, calls.creates),
            (self.map_us, calls.handles_mapped),
            (self.set_access_us, calls.map_calls),
            (self.set_access_us_per_handle, calls.handles_mapped),
            (self.unmap_us, calls.handles_unmapped),
            (self.release_us, calls.destroys),
            (self.malloc_us, calls.mallocs),
            (self.event_create_us, calls.event_creates),
            (self.event_record_us, calls.records),
            (self.event_query_us, calls.event_queries),
            (self.event_wait_us, calls.event_waits),
            (self.synchronize_us, calls.host_syncs),
        ];
        let created_mib = calls.created_bytes as f64 / MIB as f64;
        let calls: f64 = priced
            .iter()
            .map(|(price, count)| price * *count as f64)
            .sum();
        (calls + self.create_us_per_mib * created_mib) / 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_call_has_its_price() {
        let calls = Calls {
            creates: 10,
            created_bytes: 200 * MIB,
            handles_mapped: 20,
            map_calls: 1,
            handles_unmapped: 1,
            destroys: 1,
            mallocs: 1,
            event_creates: 2,
            records: 3,
            event_queries: 4,
            event_waits: 5,
            host_syncs: 6,
            ..Calls::default()
        };
        // 290 + 200, 40, 20 + 100, 34, 23, 300, 1, 3, 2, 5, 30.
        assert_eq!(Prices::default().milliseconds(&calls), 1.048);
        assert_eq!(Prices::default().milliseconds(&Calls::default()), 0.0);
    }

    #[test]
    fn lists_may_be_partial_but_not_wrong() {
        let expected = Prices {
            map_us: 7.5,
            ..Prices::default()
        };
        assert_eq!(Prices::parse("{\"map_us\": 7.5}"), Ok(expected));
        assert_eq!(Prices::parse("{}"), Ok(Prices::default()));
        for (text, reason) in [
            ("", "EOF"),
            ("[]", "invalid type: sequence"),
            ("{\"mapp_us\": 1}", "unknown field `mapp_us`"),
            ("{\"map_us\": \"1\"}", "invalid type"),
            ("{\"map_us\": -1}", "map_us must not be negative"),
            ("{\"map_us\": 1e999}", "number out of range"),
        ] {
            let error = Prices::parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
