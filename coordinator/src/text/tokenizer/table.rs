//! What every token id stands for, as bytes.

use std::sync::LazyLock;

use crate::text::TextError;

/// Most token ids of a vocabulary; the largest published ones have 262,144.
pub const MAX_VOCAB_SIZE: usize = 1 << 20;
/// Most bytes of all token strings together.
pub(crate) const MAX_VOCAB_BYTES: usize = 64 << 20;

/// How the strings of a vocabulary spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenEncoding {
    /// GPT-2's: each character stands for one byte.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` is a byte, everything else is itself.
    BytePieces,
}

/// Bytes and kind of every token, in one allocation.
#[derive(Debug, Default)]
pub struct TokenTable {
    bytes: Vec<u8>,
    /// End of each token's bytes; it starts where the one before ends.
    ends: Vec<u32>,
    special: Vec<bool>,
    longest: usize,
}

/// One token as a vocabulary lists it.
pub(crate) struct TokenEntry<'a> {
    pub(crate) text: &'a str,
    pub(crate) kind: EntryKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// Spelled in the vocabulary's encoding.
    Ordinary,
    /// Stands for its own text.
    Added,
    /// Stands for its own text, and is left out of output unless asked for.
    Special,
}

impl TokenTable {
    /// Lays out `entries` in the order of their ids; `None` is an id without a token.
    pub(crate) fn build<'a>(
        encoding: TokenEncoding,
        entries: impl ExactSizeIterator<Item = Option<TokenEntry<'a>>>,
    ) -> Result<Self, TextError> {
        TextError::check_limit("vocabulary size", entries.len(), MAX_VOCAB_SIZE)?;
        let mut table = Self::default();
        table.ends.reserve(entries.len());
        table.special.reserve(entries.len());
        for entry in entries {
            let start = table.bytes.len();
            let kind = entry.as_ref().map(|entry| entry.kind);
            match entry {
                None => {}
                Some(TokenEntry {
                    text,
                    kind: EntryKind::Ordinary,
                }) => match encoding {
                    TokenEncoding::ByteLevel => push_byte_level(text, &mut table.bytes),
                    TokenEncoding::BytePieces => push_piece(text, &mut table.bytes),
                },
                Some(entry) => table.bytes.extend_from_slice(entry.text.as_bytes()),
            }
            TextError::check_limit("vocabulary bytes", table.bytes.len(), MAX_VOCAB_BYTES)?;
            table.longest = table.longest.max(table.bytes.len() - start);
            table.ends.push(table.bytes.len() as u32);
            table.special.push(kind == Some(EntryKind::Special));
        }
        Ok(table)
    }

    /// The bytes `token` stands for; none for an id outside the vocabulary (models pad theirs).
    pub fn bytes(&self, token: u32) -> &[u8] {
        let at = token as usize;
        let Some(&end) = self.ends.get(at) else {
            return &[];
        };
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }
    /// Whether `token` is a control token, which output leaves out unless asked.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.get(token as usize).copied().unwrap_or(false)
    }
    /// Ids up to here have tokens.
    pub fn len(&self) -> usize {
        self.ends.len()
    }
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
    /// Bytes of the longest token.
    pub fn longest_token(&self) -> usize {
        self.longest
    }
}

/// GPT-2's table from characters to bytes (`bytes_to_unicode` of its encoder.py): printable Latin-1 characters are
/// themselves, the other 68 bytes are the characters from U+0100 on.
static BYTE_OF_CHAR: LazyLock<Vec<Option<u8>>> = LazyLock::new(|| {
    let mut table = vec![None; 0x100 + 68];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
});

/// A token with a character outside the table stands for its own text, as in Hugging Face's decoder.
fn push_byte_level(text: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for char in text.chars() {
        match BYTE_OF_CHAR.get(char as usize).copied().flatten() {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(text.as_bytes());
                return;
            }
        }
    }
}

fn push_piece(text: &str, out: &mut Vec<u8>) {
    if let Some(byte) = byte_piece(text) {
        return out.push(byte);
    }
    for part in text.split_inclusive('▁') {
        match part.strip_suffix('▁') {
            Some(word) => {
                out.extend_from_slice(word.as_bytes());
                out.push(b' ');
            }
            None => out.extend_from_slice(part.as_bytes()),
        }
    }
}

/// The byte of a byte-fallback piece, `<0x00>` to `<0xFF>`.
pub(crate) fn byte_piece(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(encoding: TokenEncoding, texts: &[(&str, EntryKind)]) -> TokenTable {
        let entries = texts.iter().map(|&(text, kind)| Some(TokenEntry { text, kind }));
        TokenTable::build(encoding, entries).expect("within the limits")
    }

    #[test]
    fn byte_level_characters_are_bytes_and_added_tokens_are_themselves() {
        let table = table(
            TokenEncoding::ByteLevel,
            &[
                ("Ġthe", EntryKind::Ordinary),
                ("âĢĻ", EntryKind::Ordinary),
                ("é", EntryKind::Added),
                ("a b", EntryKind::Ordinary),
                ("<|x|>", EntryKind::Special),
            ],
        );
        assert_eq!(table.bytes(0), b" the");
        assert_eq!(table.bytes(1), "’".as_bytes());
        assert_eq!(table.bytes(2), "é".as_bytes());
        assert_eq!(table.bytes(3), b"a b");
        assert_eq!((table.bytes(5), table.bytes(u32::MAX)), (&b""[..], &b""[..]));
        assert!(table.is_special(4) && !table.is_special(2) && !table.is_special(9));
        assert_eq!(table.longest_token(), 5);
    }

    #[test]
    fn pieces_spell_spaces_and_bytes() {
        let ordinary = |text| (text, EntryKind::Ordinary);
        let table = table(
            TokenEncoding::BytePieces,
            &[
                ordinary("▁a▁b"),
                ordinary("<0x0A>"),
                ordinary("<0x+1>"),
                ordinary("▁"),
            ],
        );
        assert_eq!(table.bytes(0), b" a b");
        assert_eq!(table.bytes(1), b"\n");
        assert_eq!(table.bytes(2), b"<0x+1>");
        assert_eq!(table.bytes(3), b" ");
    }
}
