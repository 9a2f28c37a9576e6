//! The `prompt` of a completions request: text or token ids, one or several.

use std::fmt;

use phalanx_proto::v1::{TokenIds, generate_request::Prompt};
use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};

use crate::limits::MAX_PROMPTS;

/// At most [`MAX_PROMPTS`] prompts, in the order given.
#[derive(Debug)]
pub(super) struct Prompts(pub(super) Vec<Prompt>);

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

/// An item of the list: what the first is decides what all are.
enum Item {
    Text(String),
    TokenId(u32),
    TokenIds(Vec<u32>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

struct ItemVisitor;

impl<'de> Visitor<'de> for ItemVisitor {
    type Value = Item;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a string, a token id or a list of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Text(text.to_owned()))
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Item, E> {
        match u32::try_from(id) {
            Ok(id) => Ok(Item::TokenId(id)),
            Err(_) => Err(E::custom(format_args!("token id {id} does not fit 32 bits"))),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut ids: A) -> Result<Item, A::Error> {
        let mut list = Vec::new();
        while let Some(id) = ids.next_element()? {
            list.push(id);
        }
        Ok(Item::TokenIds(list))
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a string, a list of strings, a list of token ids or a list of lists of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
        let many = || A::Error::custom(format_args!("more than {MAX_PROMPTS} prompts"));
        let mixed = || A::Error::custom("strings, token ids and lists of token ids do not mix");
        let mut prompts = Vec::new();
        match items.next_element()? {
            None => {}
            Some(Item::TokenId(first)) => {
                let mut ids = vec![first];
                while let Some(item) = items.next_element()? {
                    let Item::TokenId(id) = item else {
                        return Err(mixed());
                    };
                    ids.push(id);
                }
                prompts.push(Prompt::TokenIds(TokenIds { ids }));
            }
            Some(Item::Text(first)) => {
                prompts.push(Prompt::Text(first));
                while let Some(item) = items.next_element()? {
                    if prompts.len() == MAX_PROMPTS {
                        return Err(many());
                    }
                    let Item::Text(text) = item else {
                        return Err(mixed());
                    };
                    prompts.push(Prompt::Text(text));
                }
            }
            Some(Item::TokenIds(ids)) => {
                prompts.push(Prompt::TokenIds(TokenIds { ids }));
                while let Some(item) = items.next_element()? {
                    if prompts.len() == MAX_PROMPTS {
                        return Err(many());
                    }
                    let Item::TokenIds(ids) = item else {
                        return Err(mixed());
                    };
                    prompts.push(Prompt::TokenIds(TokenIds { ids }));
                }
            }
        }
        Ok(Prompts(prompts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_forms() {
        let parse = |json| serde_json::from_str::<Prompts>(json).map(|prompts| prompts.0);
        let text = |text: &str| Prompt::Text(text.to_owned());
        let ids = |ids: &[u32]| Prompt::TokenIds(TokenIds { ids: ids.to_vec() });
        assert_eq!(parse(r#""a""#).expect("text"), [text("a")]);
        assert_eq!(parse(r#"["a", "b"]"#).expect("texts"), [text("a"), text("b")]);
        assert_eq!(parse("[1, 2]").expect("ids"), [ids(&[1, 2])]);
        assert_eq!(
            parse("[[1], [], [2, 3]]").expect("lists of ids"),
            [ids(&[1]), ids(&[]), ids(&[2, 3])]
        );
        assert_eq!(parse("[]").expect("none"), []);
        for bad in [
            "1",
            "{}",
            "[1, \"a\"]",
            "[\"a\", 1]",
            "[[1], 2]",
            "[-1]",
            "[4294967296]",
            "[[[1]]]",
            "[1.5]",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
