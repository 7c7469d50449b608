//! eBPF data plane: the kernel side of `proxy-ebpf`, loaded, attached and read.
//!
//! The only room that knows aya. `docs/ebpf.md` describes the whole.

mod backends;
mod capability;
mod cgroup;
mod dataplane;
mod error;
mod flows;
pub mod ids;
mod loader;
mod locals;
pub mod members;
mod object;
mod opt_out;
mod per_cpu;
pub mod pins;
pub mod plane;
mod pod;
mod readback;
pub mod slots;
mod sockets;
mod spans;
pub mod store;
mod tables;
mod traffic;
pub mod upgrade;
mod uplinks;
pub mod value;

pub use cgroup::cgroup;
pub use dataplane::{DirectReturn, EbpfConfig, EbpfPlane};
pub use error::LoadError;
pub use flows::{FlowTable, Remembered};
pub use loader::{Attachment, Capacity, Limit, Programs, TcHook, XdpMode, check_capabilities};
pub use object::{OBJECT_ENV, check_layout, object};
pub use proxy_ebpf::layout::LAYOUT_VERSION;
pub use sockets::SocketRelease;
pub use tables::{TableError, Tables};
pub use traffic::EbpfTraffic;
