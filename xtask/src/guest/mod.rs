//! Guests: a QEMU machine under emulation that runs one command on a Debian kernel, with
//! this machine's files visible at their own paths and no network card.

mod initramfs;
mod kernel;
mod labelled;
mod run;

pub use kernel::Kernel;
pub use run::Spec;
