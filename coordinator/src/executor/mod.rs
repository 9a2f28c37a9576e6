//! The rank group as one device.
