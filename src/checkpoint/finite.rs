//! Finds numbers that JSON does not have, for which its writers put nothing, without a word.

use std::fmt;

use serde::ser::{
    Serialize, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple,
    SerializeTupleStruct, SerializeTupleVariant, Serializer,
};

/// Refuses a `value` with an infinity or NaN in it.
pub(super) fn check<T: Serialize + ?Sized>(value: &T) -> Result<(), Refusal> {
    value.serialize(Finite)
}

/// Why a value cannot be saved.
#[derive(Debug)]
pub(super) struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

impl serde::ser::Error for Refusal {
    fn custom<T: fmt::Display>(reason: T) -> Self {
        Self(reason.to_string())
    }
}

/// Takes everything and keeps nothing, but for numbers that are none.
struct Finite;

/// Methods that take what cannot hold a float.
macro_rules! fine {
    ($($method:ident($($of:ty),*);)*) => {
        $(fn $method(self $(, _: $of)*) -> Result<(), Refusal> {
            Ok(())
        })*
    };
}

/// Methods that begin what holds more.
macro_rules! begin {
    ($($method:ident($($of:ty),*);)*) => {
        $(fn $method(self $(, _: $of)*) -> Result<Self, Refusal> {
            Ok(self)
        })*
    };
}

impl Serializer for Finite {
    type Ok = ();
    type Error = Refusal;
    type SerializeSeq = Self;
    type SerializeTuple = Self;
    type SerializeTupleStruct = Self;
    type SerializeTupleVariant = Self;
    type SerializeMap = Self;
    type SerializeStruct = Self;
    type SerializeStructVariant = Self;

    fine! {
        serialize_bool(bool);
        serialize_i8(i8);
        serialize_i16(i16);
        serialize_i32(i32);
        serialize_i64(i64);
        serialize_i128(i128);
        serialize_u8(u8);
        serialize_u16(u16);
        serialize_u32(u32);
        serialize_u64(u64);
        serialize_u128(u128);
        serialize_char(char);
        serialize_str(&str);
        serialize_bytes(&[u8]);
        serialize_none();
        serialize_unit();
        serialize_unit_struct(&'static str);
        serialize_unit_variant(&'static str, u32, &'static str);
    }

    begin! {
        serialize_seq(Option<usize>);
        serialize_tuple(usize);
        serialize_tuple_struct(&'static str, usize);
        serialize_tuple_variant(&'static str, u32, &'static str, usize);
        serialize_map(Option<usize>);
        serialize_struct(&'static str, usize);
        serialize_struct_variant(&'static str, u32, &'static str, usize);
    }

    fn serialize_f32(self, value: f32) -> Result<(), Refusal> {
        self.serialize_f64(f64::from(value))
    }

    fn serialize_f64(self, value: f64) -> Result<(), Refusal> {
        if value.is_finite() {
            return Ok(());
        }
        Err(Refusal(format!("JSON has no {value}, which would be lost")))
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Refusal> {
        value.serialize(self)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), Refusal> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        value: &T,
    ) -> Result<(), Refusal> {
        value.serialize(self)
    }
}

/// What holds more: each part is looked at alone.
macro_rules! parts {
    ($($compound:ident { $($method:ident($($name:ty)?);)* })*) => {
        $(impl $compound for Finite {
            type Ok = ();
            type Error = Refusal;

            $(fn $method<T: Serialize + ?Sized>(&mut self, $(_: $name,)? value: &T) -> Result<(), Refusal> {
                value.serialize(Finite)
            })*

            fn end(self) -> Result<(), Refusal> {
                Ok(())
            }
        })*
    };
}

parts! {
    SerializeSeq { serialize_element(); }
    SerializeTuple { serialize_element(); }
    SerializeTupleStruct { serialize_field(); }
    SerializeTupleVariant { serialize_field(); }
    SerializeMap { serialize_key(); serialize_value(); }
    SerializeStruct { serialize_field(&'static str); }
    SerializeStructVariant { serialize_field(&'static str); }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Serialize)]
    enum Kind {
        Unit,
        New(f64),
        Tuple(u8, f32),
        Struct { rate: Option<f64> },
    }

    #[test]
    fn numbers_that_json_lacks_are_found_wherever_they_are() {
        let fine = (
            1u8,
            "a",
            'b',
            None::<f64>,
            Some(-0.0),
            f32::MIN_POSITIVE,
            (),
        );
        check(&fine).unwrap();
        check(&[Kind::Unit, Kind::New(1.0), Kind::Tuple(1, 2.0)]).unwrap();
        for narrow in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let bad = f64::from(narrow);
            let map = std::collections::BTreeMap::from([("best loss", vec![0.5, bad])]);
            let told = [
                check(&bad),
                check(&Some(narrow)),
                check(&(1, bad)),
                check(&map),
                check(&Kind::New(bad)),
                check(&Kind::Tuple(1, narrow)),
                check(&Kind::Struct { rate: Some(bad) }),
            ];
            for told in told {
                let told = told.unwrap_err().to_string();
                assert_eq!(told, format!("JSON has no {bad}, which would be lost"));
            }
        }
    }
}
