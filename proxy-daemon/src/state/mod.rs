//! `state`
