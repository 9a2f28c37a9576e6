//! `--kv-events-config`, vLLM's JSON object.

use phalanx_coordinator::{config::KvEventsOptions, kv_events::ZmqOptions};
use serde::Deserialize;

/// More batches than this are not kept for replay.
const MAX_BUFFER_STEPS: usize = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KvEventsConfig {
    #[serde(default)]
    enable_kv_cache_events: bool,
    publisher: Option<Publisher>,
    #[serde(default = "default_endpoint")]
    endpoint: String,
    replay_endpoint: Option<String>,
    #[serde(default = "default_buffer_steps")]
    buffer_steps: usize,
    #[serde(default)]
    topic: String,
    /// How far a subscriber and the publisher itself may be behind is bounded here whatever these say.
    #[serde(rename = "hwm")]
    _hwm: Option<u64>,
    #[serde(rename = "max_queue_size")]
    _max_queue_size: Option<u64>,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Publisher {
    Null,
    Zmq,
}

fn default_endpoint() -> String {
    "tcp://*:5557".to_owned()
}

fn default_buffer_steps() -> usize {
    10_000
}

pub(crate) fn parse(text: &str) -> Result<KvEventsOptions, String> {
    let config: KvEventsConfig = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if config.buffer_steps > MAX_BUFFER_STEPS {
        return Err(format!(
            "buffer_steps is {}, limit {MAX_BUFFER_STEPS}",
            config.buffer_steps
        ));
    }
    let enabled = config.enable_kv_cache_events;
    // As in vLLM, events that are enabled are published unless that is turned off.
    let publishes = enabled && config.publisher.unwrap_or(Publisher::Zmq) == Publisher::Zmq;
    Ok(KvEventsOptions {
        enabled,
        zmq: publishes.then_some(ZmqOptions {
            endpoint: config.endpoint,
            replay_endpoint: config.replay_endpoint,
            buffer_steps: config.buffer_steps,
            topic: config.topic,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllms_object_is_understood() {
        let zmq = |text: &str| parse(text).expect(text).zmq;
        let whole = r#"{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:7000",
            "replay_endpoint": "tcp://*:7001", "buffer_steps": 5, "hwm": 1000, "topic": "kv-events"}"#;
        let expected = ZmqOptions {
            endpoint: "tcp://*:7000".to_owned(),
            replay_endpoint: Some("tcp://*:7001".to_owned()),
            buffer_steps: 5,
            topic: "kv-events".to_owned(),
        };
        assert_eq!(zmq(whole), Some(expected));
        let short = zmq(r#"{"enable_kv_cache_events": true}"#).expect("published");
        assert_eq!(
            (short.endpoint.as_str(), short.buffer_steps),
            ("tcp://*:5557", 10_000)
        );
        let quiet = parse(r#"{"enable_kv_cache_events": true, "publisher": "null"}"#).expect("valid");
        assert!(quiet.enabled && quiet.zmq.is_none());
        assert_eq!(parse("{}"), Ok(KvEventsOptions::default()));
        assert_eq!(zmq(r#"{"publisher": "zmq"}"#), None, "not enabled");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, words) in [
            (r#"{"publisher": "kafka"}"#, "kafka"),
            (r#"{"enabled": true}"#, "enabled"),
            (r#"{"buffer_steps": 9999999}"#, "limit"),
            ("true", "expected"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(words), "{error}");
        }
    }
}
