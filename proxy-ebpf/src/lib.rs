#![no_std]
//! Map layout shared by the daemon and the eBPF programs.
