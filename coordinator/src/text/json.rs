//! JSON whose objects keep the order of their keys: a template shows a model its tools in the order in which the client
//! wrote them, and a grammar asks for arguments in that order, too.

use std::{collections::HashMap, fmt, sync::Arc};

use minijinja::{
    Value,
    value::{Enumerator, Object, ObjectExt as _},
};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::Number;

/// A JSON value. The parser bounds how deeply it is nested (128).
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The value of `key`, the last one if there are several; none if this is no object.
    pub(crate) fn get(&self, key: &str) -> Option<&Json> {
        let Self::Object(entries) = self else { return None };
        let entry = entries.iter().rev().find(|(name, _)| name == key);
        entry.map(|(_, value)| value)
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn as_array(&self) -> Option<&[Json]> {
        match self {
            Self::Array(items) => Some(items),
            _ => None,
        }
    }

    pub(crate) fn is_object(&self) -> bool {
        matches!(self, Self::Object(_))
    }

    /// As templates see it.
    pub(crate) fn to_value(&self) -> Value {
        match self {
            Self::Null => Value::from(()),
            Self::Bool(value) => Value::from(*value),
            Self::Number(number) => Value::from_serialize(number),
            Self::String(text) => Value::from(text.as_str()),
            Self::Array(items) => items.iter().map(Json::to_value).collect(),
            Self::Object(entries) => Value::from_object(OrderedMap::of(entries)),
        }
    }
}

/// Compact JSON.
impl fmt::Display for Json {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = serde_json::to_string(self).map_err(|_| fmt::Error)?;
        out.write_str(&text)
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

/// An object of the keys and values, in their order.
pub(crate) fn object<const N: usize>(entries: [(&str, Json); N]) -> Json {
    Json::Object(entries.map(|(key, value)| (key.to_owned(), value)).into())
}

/// An object as templates see it. Looking up a key costs the same in a large one.
#[derive(Debug)]
struct OrderedMap {
    entries: Vec<(Value, Value)>,
    places: HashMap<String, usize>,
}

impl OrderedMap {
    fn of(entries: &[(String, Json)]) -> Self {
        let mut map = Self {
            entries: Vec::with_capacity(entries.len()),
            places: HashMap::with_capacity(entries.len()),
        };
        for (key, value) in entries {
            let place = *map.places.entry(key.clone()).or_insert(map.entries.len());
            let entry = (Value::from(key.as_str()), value.to_value());
            match map.entries.get_mut(place) {
                Some(earlier) => *earlier = entry,
                None => map.entries.push(entry),
            }
        }
        map
    }
}

impl Object for OrderedMap {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        let place = *self.places.get(key)?;
        Some(self.entries[place].1.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|map| Box::new(map.entries.iter().map(|(key, _)| key.clone())))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.entries.len())
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Number(number) => number.serialize(serializer),
            Self::String(text) => serializer.serialize_str(text),
            Self::Array(items) => serializer.collect_seq(items),
            Self::Object(entries) => serializer.collect_map(entries.iter().map(|(key, value)| (key, value))),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("a number that is not finite"))?;
        Ok(Json::Number(number))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Json, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Json::Object(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_keys_survives() {
        let text = r#"{"z":1,"a":[true,null,{"y":-2,"b":1.5}],"m":"é"}"#;
        let json: Json = serde_json::from_str(text).expect("valid");
        assert_eq!(json.to_string(), text);
        assert_eq!(serde_json::to_string(&json.to_value()).expect("serializes"), text);
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let json: Json = serde_json::from_str(r#"{"a": 1, "b": 2, "a": 3}"#).expect("valid");
        assert_eq!(json.get("a"), Some(&Json::Number(3.into())));
        assert_eq!(
            serde_json::to_string(&json.to_value()).expect("serializes"),
            r#"{"a":3,"b":2}"#
        );
    }

    #[test]
    fn nesting_is_bounded() {
        let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
        assert!(serde_json::from_str::<Json>(&deep).is_err());
    }
}
