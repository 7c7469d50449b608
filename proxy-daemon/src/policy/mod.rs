//! `policy`
