//! Support for the end-to-end tests: real processes, found, started, watched and killed.
#![forbid(unsafe_code)]
