//! `watch`
