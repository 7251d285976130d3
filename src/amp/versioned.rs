//! Reading saved states that carry a version.
//!
//! A state of another version is refused with that version, whatever else is in it: so it is taken apart only after
//! its version was looked at. That takes a format that tells what it holds, as JSON does.
//!
//! Must not know: what a state means.

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A state that has a version from 1 to `version`, or none, to be taken apart.
pub(super) fn checked<'de, D: Deserializer<'de>>(
    deserializer: D,
    version: u32,
) -> Result<Value, D::Error> {
    let state = Value::deserialize(deserializer)?;
    match state.get("version").filter(|found| !found.is_null()) {
        Some(found)
            if !found
                .as_u64()
                .is_some_and(|found| (1..=u64::from(version)).contains(&found)) =>
        {
            let reason = format!("version {found} is not known; this is version {version}");
            Err(Error::custom(reason))
        }
        _ => Ok(state),
    }
}
