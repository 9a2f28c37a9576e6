//! SIGINT, SIGTERM and SIGHUP: the first asks for an orderly end, the second for an end now.

use std::{
    fs,
    future::pending,
    io,
    time::{Duration, Instant},
};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Within this time after the first signal, SIGTERM is the same one.
const ECHO: Duration = Duration::from_millis(500);

pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// None where the starter wants it ignored, as `nohup` does.
    hangup: Option<Signal>,
}

impl Signals {
    /// From here on none of the signals kills the process by itself.
    pub(crate) fn install() -> io::Result<Self> {
        let hangup = SignalKind::hangup();
        let ignored = is_ignored(&fs::read_to_string("/proc/self/status")?, hangup);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: if ignored { None } else { Some(signal(hangup)?) },
        })
    }

    /// The next one that is not the first one's echo: a supervisor that signals a process and then its group sends two
    /// SIGTERM. Who presses Ctrl-C twice means it.
    pub(crate) async fn again(&mut self) -> &'static str {
        let echoes = Instant::now() + ECHO;
        loop {
            let name = self.next().await;
            if name != "SIGTERM" || Instant::now() >= echoes {
                return name;
            }
        }
    }

    /// Waits for one of them; returns its name.
    pub(crate) async fn next(&mut self) -> &'static str {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = hangup => "SIGHUP",
        }
    }
}

/// Whether proc(5)'s `SigIgn`, a mask in which signal 1 is the lowest bit, holds the signal.
fn is_ignored(status: &str, kind: SignalKind) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (kind.as_raw_value() - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ignored_signal_is_seen() {
        let status = "Name:\tphalanx\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\n";
        assert!(is_ignored(status, SignalKind::hangup()));
        assert!(is_ignored(status, SignalKind::pipe()));
        assert!(!is_ignored(status, SignalKind::terminate()));
        assert!(!is_ignored("", SignalKind::hangup()));
    }
}
