//! gRPC services over engine and text.
