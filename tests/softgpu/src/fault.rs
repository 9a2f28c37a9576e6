//! A kernel that touches what it may not touch ends with `CUDA_ERROR_ILLEGAL_ADDRESS`, as on a GPU, and the process
//! lives: the SIGSEGV handler leaves the block from the stack of the fiber at fault.

use std::{cell::Cell, mem::MaybeUninit, sync::Once};

use libc::{c_int, c_void, siginfo_t};

thread_local! {
    /// While this thread runs blocks: the entry of the kernel's module that leaves the block.
    static LEAVE: Cell<Option<extern "C" fn()>> = const { Cell::new(None) };
    /// The address of the last fault, until somebody asks.
    static ADDRESS: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Runs `blocks`, which calls into the module whose `softgpu_fault` is `leave`. Returns its result, and the address of
/// the fault that ended it, if one did.
pub(crate) fn guard<T>(leave: extern "C" fn(), blocks: impl FnOnce() -> T) -> (T, Option<usize>) {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
    LEAVE.set(Some(leave));
    let result = blocks();
    LEAVE.set(None);
    (result, ADDRESS.take())
}

fn install() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: a zeroed sigaction is valid: no flags, an empty mask. Installing a handler has no further precondition.
        // SA_NODEFER, because the handler does not return when it leaves a block; no SA_ONSTACK, because the module
        // finds the fiber from the stack pointer.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = on_fault as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    if let Some(leave) = LEAVE.take() {
        // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo, and si_addr is set for these signals.
        ADDRESS.set(Some(unsafe { (*info).si_addr() } as usize));
        leave(); // does not return: the kernel's code holds no lock and no half-made state that matters
    }
    // Not a kernel's doing: die as without a handler, at the instruction that is tried again.
    // SAFETY: resetting a signal's disposition is allowed in a handler.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
