//! What tests begin with.

use std::sync::Arc;

use super::{BackendSet, Frontend, FrontendKind, Masquerade, PortName, WhenEmpty};
use crate::model::ObjectName;

/// The ClusterIP of a Service's port without a name.
pub fn frontend(service: ObjectName, backends: BackendSet) -> Frontend {
    Frontend {
        port: PortName { service, port: "".into() },
        kind: FrontendKind::ClusterIp,
        backends,
        local_only: false,
        endpoints: Arc::default(),
        short_circuit_set: None,
        short_circuit: None,
        shared: None,
        when_empty: WhenEmpty::Reject,
        masquerade: Masquerade::FromOutside,
        on_node_address: false,
        among_nodes: false,
        affinity: None,
        source_ranges: Arc::from([]),
        scheduling: None,
    }
}
