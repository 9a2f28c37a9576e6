//! What becomes of a worker process of this machine.

use std::{
    io,
    os::unix::process::ExitStatusExt,
    process::{Child, ExitStatus},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fd::{AsFd, OwnedFd},
    io::Errno,
    process::{WaitId, WaitIdOptions, WaitIdStatus, waitid},
};

/// A process that was stopped and does not go on within this time is as good as dead: its peers wait for it.
pub(super) const STOP_GRACE: Duration = Duration::from_millis(500);
/// Between two looks at a process that was stopped.
const PAUSE: Duration = Duration::from_millis(20);

/// Follows a child to its end, which it returns in words. `stopped` is called if it is stopped for good before; it need
/// not be: a signal may still let it go on.
///
/// # Errors
/// The kernel cannot tell: somebody else has waited for the child.
pub(super) fn follow(child: &mut Child, pidfd: &OwnedFd, stopped: impl Fn(String)) -> io::Result<String> {
    loop {
        let change = wait(
            pidfd,
            WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT,
        )?;
        let Some(signal) = change.and_then(|change| change.stopping_signal()) else {
            return child.wait().map(describe);
        };
        // Looked at once, so that the next look waits for a change.
        take(pidfd, WaitIdOptions::STOPPED)?;
        if !goes_on(pidfd)? {
            stopped(format!(
                "its process was stopped by signal {signal} and did not go on within {STOP_GRACE:?}"
            ));
        }
    }
}

/// Whether a stopped child continues, or ends, within [`STOP_GRACE`].
fn goes_on(pidfd: &OwnedFd) -> io::Result<bool> {
    let deadline = Instant::now() + STOP_GRACE;
    while Instant::now() < deadline {
        if take(pidfd, WaitIdOptions::CONTINUED)? {
            return Ok(true);
        }
        let ended = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        if wait(pidfd, ended)?.is_some() {
            return Ok(true);
        }
        thread::sleep(PAUSE);
    }
    Ok(false)
}

/// Takes note of a change that is not the end, if there was one. Of a child that has ended the kernel says `ECHILD` to
/// this, as if there had never been one.
fn take(pidfd: &OwnedFd, change: WaitIdOptions) -> io::Result<bool> {
    match wait(pidfd, change | WaitIdOptions::NOHANG) {
        Err(error) if error.raw_os_error() == Some(Errno::CHILD.raw_os_error()) => Ok(false),
        found => Ok(found?.is_some()),
    }
}

fn wait(pidfd: &OwnedFd, options: WaitIdOptions) -> io::Result<Option<WaitIdStatus>> {
    rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(pidfd.as_fd()), options)).map_err(io::Error::from)
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("its process exited with status {code}"),
        (_, Some(signal)) => format!("its process was killed by signal {signal}"),
        _ => "its process ended".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, process::Command};

    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

    use super::*;

    /// A process that sleeps, and a handle to it.
    fn sleeper() -> (Child, OwnedFd) {
        let child = Command::new("sleep").arg("600").spawn().expect("sleep starts");
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).expect("a handle");
        (child, pidfd)
    }

    #[test]
    fn a_killed_process_is_described() {
        let (mut child, pidfd) = sleeper();
        pidfd_send_signal(&pidfd, Signal::KILL).expect("killed");
        let end = follow(&mut child, &pidfd, |why| panic!("{why}")).expect("its end");
        assert_eq!(end, "its process was killed by signal 9");
    }

    #[test]
    fn a_stopped_process_is_reported_once_and_before_its_end() {
        let (mut child, pidfd) = sleeper();
        pidfd_send_signal(&pidfd, Signal::STOP).expect("stopped");
        let reports = RefCell::new(Vec::new());
        let end = follow(&mut child, &pidfd, |why| {
            reports.borrow_mut().push(why);
            pidfd_send_signal(&pidfd, Signal::KILL).expect("killed");
        });
        assert_eq!(end.expect("its end"), "its process was killed by signal 9");
        assert_eq!(
            reports.into_inner(),
            ["its process was stopped by signal 19 and did not go on within 500ms"]
        );
    }

    #[test]
    fn a_process_that_ends_while_it_is_stopped_has_ended() {
        let (mut child, pidfd) = sleeper();
        pidfd_send_signal(&pidfd, Signal::KILL).expect("killed");
        wait(&pidfd, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).expect("its end");
        assert!(goes_on(&pidfd).expect("the kernel tells"));
        child.wait().expect("still there to be waited for");
    }

    #[test]
    fn a_process_that_goes_on_was_never_lost() {
        let (mut child, pidfd) = sleeper();
        pidfd_send_signal(&pidfd, Signal::STOP).expect("stopped");
        thread::scope(|scope| {
            let followed = scope.spawn(|| follow(&mut child, &pidfd, |why| panic!("{why}")));
            pidfd_send_signal(&pidfd, Signal::CONT).expect("it goes on");
            pidfd_send_signal(&pidfd, Signal::TERM).expect("ended");
            let end = followed.join().expect("no panic").expect("its end");
            assert_eq!(end, "its process was killed by signal 15");
        });
    }
}
