//! JSON from files that nobody vouches for: every key once, nothing too deep.
//!
//! `serde_json` refuses what is nested deeper than 128 levels, but takes the last of several equal keys, where
//! another reader may take the first.

use std::collections::HashSet;
use std::fmt;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor,
};

/// Reads `text` as `T`.
///
/// # Errors
/// Tells in one line what is wrong, and where.
pub(super) fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut walk = serde_json::Deserializer::from_str(text);
    let walked = UniqueKeys.deserialize(&mut walk);
    walked.map_err(|error| error.to_string())?;
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// Walks over any value, and fails at a key that an object has twice.
#[derive(Clone, Copy)]
struct UniqueKeys;

impl<'de> DeserializeSeed<'de> for UniqueKeys {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            if seen.contains(&key) {
                return Err(A::Error::custom(format_args!(
                    "the key `{key}` stands twice"
                )));
            }
            seen.insert(key);
            entries.next_value_seed(self)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn keys_stand_once_at_every_depth() {
        assert!(parse::<Value>(r#"{"a": [{"b": 1}, {"b": null}], "b": -1.5}"#).is_ok());
        for text in [
            r#"{"a": 1, "a": 1}"#,
            r#"[true, {"x": {"a": "", "a": {}}}]"#,
        ] {
            let refused = parse::<Value>(text).unwrap_err();
            assert!(refused.starts_with("the key `a` stands twice"), "{refused}");
        }
        assert!(parse::<Value>(&"[".repeat(100_000)).is_err());
        assert!(parse::<Value>("{\"a\": NaN}").is_err());
    }

    #[test]
    fn numbers_keep_every_bit() {
        let mut state = 1u64;
        for _ in 0..10_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let number = f64::from_bits(state);
            if number.is_finite() {
                let text = serde_json::to_string(&number).unwrap();
                assert_eq!(parse::<f64>(&text).unwrap().to_bits(), number.to_bits());
            }
        }
    }
}
