//! `logit_bias`: token ids, as the strings that JSON's keys are, to numbers.

use std::{collections::HashMap, fmt};

use phalanx_proto::limits::MAX_LOGIT_BIAS;
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

/// At most [`MAX_LOGIT_BIAS`] entries, no token twice, every number finite in 32 bits.
#[derive(Debug, Default)]
pub(crate) struct LogitBias(pub(crate) HashMap<u32, f32>);

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(BiasVisitor)
    }
}

struct BiasVisitor;

impl<'de> Visitor<'de> for BiasVisitor {
    type Value = LogitBias;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object from token ids to numbers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LogitBias, A::Error> {
        let mut bias = HashMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let token: u32 = key
                .parse()
                .map_err(|_| A::Error::custom("a key is not a token id"))?;
            let value: f32 = map.next_value()?;
            if !value.is_finite() {
                return Err(A::Error::custom("not a finite 32-bit number"));
            }
            if bias.insert(token, value).is_some() {
                return Err(A::Error::custom(format_args!("token {token} is there twice")));
            }
            if bias.len() > MAX_LOGIT_BIAS {
                return Err(A::Error::custom(format_args!(
                    "more than {MAX_LOGIT_BIAS} entries"
                )));
            }
        }
        Ok(LogitBias(bias))
    }
}
