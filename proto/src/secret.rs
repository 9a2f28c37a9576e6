//! Secrets: making them, and comparing them in a time that tells nothing.

use std::{fmt, hint::black_box, sync::Arc};

use sha2::{Digest, Sha256};

/// Random bytes of the kernel.
///
/// # Panics
/// Not on Linux: `getrandom(2)` has no error for so few bytes, and before the kernel has entropy it waits.
pub fn random<const N: usize>() -> [u8; N] {
    const { assert!(N <= 256, "longer reads can be interrupted") };
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("getrandom(2) has no error for so few bytes");
    bytes
}

/// The same as a number, for ids and seeds that no client can foresee.
pub fn random_u64() -> u64 {
    u64::from_ne_bytes(random())
}

/// Compares in a time that depends on the length of `given` alone, which its sender knows. An empty secret is like
/// nothing.
pub fn same(secret: &[u8], given: &[u8]) -> bool {
    if secret.is_empty() {
        return false;
    }
    let mut difference = u8::from(secret.len() != given.len());
    for (index, byte) in given.iter().enumerate() {
        difference |= black_box(byte ^ secret[index % secret.len()]);
    }
    difference == 0
}

/// The first 64 bits of SHA-256: an id for a name that is too long, or not to be told.
pub fn fingerprint(name: &str) -> u64 {
    let digest: [u8; 32] = Sha256::digest(name).into();
    digest[..8]
        .iter()
        .fold(0, |bits, &byte| bits << 8 | u64::from(byte))
}

/// An empty key would let everybody in: a variable that was not set must not open the door. One with control characters
/// fits no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("API key number {position} is empty or holds control characters")]
pub struct BadApiKey {
    /// Counted from one.
    pub position: usize,
}

/// The keys a client may present as `Authorization: Bearer <key>`, over HTTP and over gRPC. Never printed.
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<[String]>);

impl ApiKeys {
    /// Takes the keys as configured; without any, no key is needed.
    ///
    /// # Errors
    /// [`BadApiKey`].
    pub fn new(keys: impl IntoIterator<Item = String>) -> Result<Self, BadApiKey> {
        let keys: Vec<String> = keys.into_iter().collect();
        let unusable = |key: &String| key.is_empty() || key.chars().any(char::is_control);
        match keys.iter().position(unusable) {
            Some(index) => Err(BadApiKey { position: index + 1 }),
            None => Ok(Self(keys.into())),
        }
    }

    /// Nobody needs a key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What a holder of the first key presents.
    pub fn authorization(&self) -> Option<String> {
        self.0.first().map(|key| format!("Bearer {key}"))
    }

    /// The first key, for who presents it without a scheme.
    pub fn first(&self) -> Option<&str> {
        self.0.first().map(String::as_str)
    }

    /// Whose requests these are, as a name that tells nothing of the key; none if no key was presented.
    pub fn tenant(authorization: Option<&[u8]>) -> Option<String> {
        let key = authorization.and_then(bearer).filter(|key| !key.is_empty())?;
        let mut hash = Sha256::new();
        hash.update(b"phalanx tenant");
        hash.update(key);
        let bytes: [u8; 32] = hash.finalize().into();
        Some(bytes[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Whether the value of an `Authorization` header holds the first key, which is the gateway's own.
    pub fn is_first(&self, authorization: Option<&[u8]>) -> bool {
        let given = authorization.and_then(bearer).unwrap_or_default();
        self.0.first().is_some_and(|key| same(key.as_bytes(), given))
    }

    /// Whether the value of an `Authorization` header holds one of the keys. Always true without keys.
    pub fn admit(&self, authorization: Option<&[u8]>) -> bool {
        let given = authorization.and_then(bearer).unwrap_or_default();
        self.contains(given) || self.is_empty()
    }

    /// Whether `given` is one of the keys. Never without keys.
    pub fn contains(&self, given: &[u8]) -> bool {
        // Every key is compared, whether or not an earlier one matched.
        self.0
            .iter()
            .fold(false, |found, key| found | same(key.as_bytes(), given))
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "ApiKeys({} hidden)", self.0.len())
    }
}

/// The token of a `Bearer` authorization; the scheme is case-insensitive (RFC 9110, 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(keys: &[&str], authorization: &str) -> bool {
        let keys = ApiKeys::new(keys.iter().map(ToString::to_string)).expect("no empty key");
        keys.admit(Some(authorization.as_bytes()))
    }

    #[test]
    fn only_a_whole_key_is_admitted() {
        assert!(admits(&["abc", "sesame"], "Bearer sesame"));
        assert!(admits(&["sesame"], "bearer  sesame "));
        for wrong in [
            "Bearer sesam",
            "Bearer sesamesesame",
            "Bearer ",
            "Bearer",
            "sesame",
            "Basic sesame",
            "",
        ] {
            assert!(!admits(&["sesame"], wrong), "{wrong}");
        }
        assert!(ApiKeys::default().admit(None), "without keys none is needed");
        let keys = ApiKeys::new(["sesame".to_owned()]).expect("no empty key");
        assert!(keys.contains(b"sesame") && !keys.contains(b"sesam") && !keys.contains(b""));
        assert!(
            !ApiKeys::default().contains(b"sesame"),
            "nobody holds a key that is not there"
        );
    }

    #[test]
    fn what_a_holder_presents_is_admitted() {
        let keys = ApiKeys::new(["sesame".to_owned(), "abc".to_owned()]).expect("no empty key");
        let authorization = keys.authorization().expect("a key");
        assert!(keys.admit(Some(authorization.as_bytes())));
        assert_eq!(ApiKeys::default().authorization(), None);
    }

    #[test]
    fn empty_keys_are_refused_and_keys_are_not_printed() {
        let error = ApiKeys::new(["a".to_owned(), String::new()]).expect_err("an empty key");
        assert_eq!(
            error.to_string(),
            "API key number 2 is empty or holds control characters"
        );
        assert!(ApiKeys::new(["a\nb".to_owned()]).is_err());
        let keys = ApiKeys::new(["sesame".to_owned()]).expect("no empty key");
        assert_eq!(format!("{keys:?}"), "ApiKeys(1 hidden)");
    }

    #[test]
    fn a_tenant_is_a_key_and_not_the_key() {
        let tenant = |value: &str| ApiKeys::tenant(Some(value.as_bytes()));
        let sesame = tenant("Bearer sesame").expect("a key");
        assert_eq!(tenant("bearer  sesame "), Some(sesame.clone()));
        assert_eq!(sesame.len(), 32);
        assert_ne!(tenant("Bearer abc"), Some(sesame));
        assert_eq!(
            (tenant("Bearer "), tenant("Basic x"), ApiKeys::tenant(None)),
            (None, None, None)
        );
        let keys = ApiKeys::new(["sesame".to_owned(), "abc".to_owned()]).expect("keys");
        assert!(keys.is_first(Some(b"Bearer sesame")) && !keys.is_first(Some(b"Bearer abc")));
        assert!(!keys.is_first(None) && !ApiKeys::default().is_first(Some(b"Bearer ")));
    }

    #[test]
    fn secrets_differ_and_empty_ones_match_nothing() {
        assert_ne!(random::<16>(), random::<16>());
        assert!(same(b"token", b"token"));
        assert!(!same(b"token", b"tokem") && !same(b"token", b"") && !same(b"", b""));
    }
}
