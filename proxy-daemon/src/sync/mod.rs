//! `sync`
