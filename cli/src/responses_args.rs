//! Flags of the store of responses.

use clap::{Args, builder::BoolishValueParser};
use phalanx_gateway::StoreLimits;

/// Which responses of /v1/responses are stored. Off, as with vLLM, whose variable turns it on.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ResponsesArgs {
    /// Store responses in the gateway's memory, so that clients can retrieve them, go on from them, and have them made
    /// in the background.
    #[arg(long, env = "VLLM_ENABLE_RESPONSES_API_STORE", value_parser = BoolishValueParser::new())]
    enable_responses_api_store: bool,
    /// Most responses that are stored; the oldest goes first.
    #[arg(long, env = "PHALANX_MAX_STORED_RESPONSES", default_value_t = StoreLimits::default().responses)]
    max_stored_responses: usize,
    /// Most bytes of all of them, with their conversations.
    #[arg(long, env = "PHALANX_MAX_STORED_RESPONSE_BYTES", default_value_t = StoreLimits::default().bytes)]
    max_stored_response_bytes: usize,
}

impl ResponsesArgs {
    /// None: nothing is stored.
    pub(crate) fn limits(self) -> Option<StoreLimits> {
        self.enable_responses_api_store.then_some(StoreLimits {
            responses: self.max_stored_responses,
            bytes: self.max_stored_response_bytes,
        })
    }

    /// The same flags for a gateway in a process of its own.
    pub(crate) fn arguments(self) -> impl Iterator<Item = String> {
        let numbers = [
            ("--max-stored-responses", self.max_stored_responses),
            ("--max-stored-response-bytes", self.max_stored_response_bytes),
        ];
        let numbers = numbers
            .into_iter()
            .flat_map(|(flag, value)| [flag.to_owned(), value.to_string()]);
        let enable = self.enable_responses_api_store;
        let flag = enable.then(|| "--enable-responses-api-store".to_owned());
        flag.into_iter().chain(numbers)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        responses: ResponsesArgs,
    }

    fn parse<'a>(flags: impl IntoIterator<Item = &'a str>) -> ResponsesArgs {
        let arguments = ["phalanx"].into_iter().chain(flags);
        Only::try_parse_from(arguments).map_or_else(|error| panic!("{error}"), |only| only.responses)
    }

    #[test]
    fn nothing_is_stored_unless_asked_for() {
        assert_eq!(parse([]).limits(), None);
        assert_eq!(
            parse(["--enable-responses-api-store"]).limits(),
            Some(StoreLimits::default())
        );
    }

    #[test]
    fn a_gateway_of_its_own_stores_the_same() {
        let given = [
            "--enable-responses-api-store",
            "--max-stored-responses",
            "3",
            "--max-stored-response-bytes",
            "4000",
        ];
        let args = parse(given);
        let limits = StoreLimits {
            responses: 3,
            bytes: 4000,
        };
        assert_eq!(args.limits(), Some(limits));
        let passed: Vec<String> = args.arguments().collect();
        assert_eq!(parse(passed.iter().map(String::as_str)).limits(), Some(limits));
    }
}
