//! Flags to one `Config`.
