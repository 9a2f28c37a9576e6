//! Log lines on standard error, as text or JSON.

use phalanx_proto::spans::{Tracer, TracerError};
use tracing_subscriber::EnvFilter;

use crate::args::{LogFormat, LoggingArgs};

/// What spans are said to be of, unless the environment says otherwise.
const SERVICE: &str = "phalanx";

/// Where this process's spans go.
pub(crate) fn tracer(args: &LoggingArgs) -> Result<Tracer, TracerError> {
    let Some(endpoint) = &args.otlp_traces_endpoint else {
        return Ok(Tracer::default());
    };
    let service = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| SERVICE.to_owned());
    Tracer::start(endpoint, &service)
}

/// Starts logging. An unusable filter is an error: silence would look like health.
pub(crate) fn init(args: &LoggingArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log_level)
        .map_err(|error| anyhow::anyhow!("--log-level {:?}: {error}", args.log_level))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    match args.log_format {
        LogFormat::Text => builder
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}
