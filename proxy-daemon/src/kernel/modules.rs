//! Kernel modules. The daemon runs no `modprobe` (its image holds none): the kernel
//! loads what a request needs when it can, and when it cannot the error says what to do.

/// The kernel lacks something that a module provides, and could not load it itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the kernel has no {feature}: load the module {module} on the node (`modprobe {module}`), \
     or use a kernel built with it"
)]
pub struct MissingModule {
    pub module: String,
    pub feature: String,
}

impl MissingModule {
    pub fn new(module: impl Into<String>, feature: impl Into<String>) -> Self {
        Self { module: module.into(), feature: feature.into() }
    }
}
