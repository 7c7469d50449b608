//! A port of a Service, as tests make one up.

use serde_json::{Value, json};

use crate::traffic::Protocol;

/// A port of a Service.
#[derive(Debug, Clone)]
pub struct Port {
    pub name: String,
    pub protocol: Protocol,
    pub port: u16,
    /// Where the pods listen.
    pub target: u16,
    pub node_port: Option<u16>,
}

impl Port {
    /// Without a node port.
    #[must_use]
    pub fn new(name: &str, protocol: Protocol, port: u16, target: u16) -> Self {
        Self { name: name.to_owned(), protocol, port, target, node_port: None }
    }

    /// As in a Service's `spec.ports`.
    #[must_use]
    pub fn of_service(&self) -> Value {
        let mut value = json!({
            "name": self.name, "port": self.port, "targetPort": self.target,
            "protocol": self.protocol.to_string(),
        });
        if let Some(node_port) = self.node_port {
            value["nodePort"] = json!(node_port);
        }
        value
    }
}
