//! What the coordinator counts and measures.
