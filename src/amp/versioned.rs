//! Reads saved states that carry a version.
//!
//! The version is checked before the rest is parsed, so a state of an unknown version is refused by its version,
//! whatever else it contains. This requires a self-describing format such as JSON.
//!
//! Must not know: the meaning of a state.

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// The raw state, if its version is from 1 to `version` or absent.
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
