//! Which fields a body's deserializer reads.

use serde::{
    Deserializer,
    de::{DeserializeOwned, Error, Visitor, value},
    forward_to_deserialize_any,
};

/// The names that the derived `Deserialize` of `T` knows; none if it is not a derived struct.
pub(super) fn of<T: DeserializeOwned>() -> Vec<&'static str> {
    let mut names: &[&str] = &[];
    // Always fails: a derived struct says what it wants before it gets anything.
    let _failed = T::deserialize(Probe(&mut names));
    names.to_vec()
}

/// Notes what it is asked for, and has nothing to give.
struct Probe<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = value::Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, value::Error> {
        *self.0 = fields;
        Err(value::Error::custom("a probe has no value"))
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, value::Error> {
        Err(value::Error::custom("a probe has no value"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[test]
    fn a_struct_tells_its_fields_and_others_none() {
        #[derive(Deserialize)]
        struct Named {
            #[serde(rename = "other")]
            _one: u32,
            #[serde(default)]
            _two: Option<Vec<String>>,
        }
        assert_eq!(of::<Named>(), ["other", "_two"]);
        assert!(of::<u32>().is_empty() && of::<Option<Named>>().is_empty());
    }
}
