//! The gateway over real sockets: raw HTTP on one side, a real tonic server on the other.
//!
//! The server is scripted, since what is under test is the translation between the two; the real coordinator behind
//! the gateway is tested with the whole cluster.

mod access;
mod anthropic;
mod control;
mod damage;
mod documents;
mod errors;
mod inference;
mod operator;
mod outputs;
mod responses;
mod router;
mod shapes;
mod shutdown;
mod streams;
mod support;
mod tgi;
mod tls;
mod tokenizer;
mod tools;
