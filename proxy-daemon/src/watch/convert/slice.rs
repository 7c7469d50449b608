//! EndpointSlices.

use std::net::IpAddr;
use std::time::SystemTime;

use super::{
    Complaints, Converted, LABEL_HEADLESS, LABEL_SERVICE_NAME, Part, has_label, ip, object_name,
    port, protocol, unusable,
};
use crate::model::{
    Endpoint, EndpointSlice, Family, NodeName, ObjectName, Placement, SlicePort, Zone, intern,
};
use crate::watch::wire as api;

const KIND: &str = "EndpointSlice";
/// When the change that led to this version of the slice happened (set by the
/// EndpointSlice controller, `k8s.io/api/core/v1`, `EndpointsLastChangeTriggerTime`).
pub(super) const ANNOTATION_TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";

#[must_use]
pub fn slice(object: &api::EndpointSlice) -> Converted<EndpointSlice> {
    let name = match object_name(KIND, &object.metadata) {
        Ok(name) => name,
        Err(rejected) => return Converted::Rejected(rejected),
    };
    if has_label(&object.metadata, LABEL_HEADLESS) {
        return Converted::NotOurs("it carries the label service.kubernetes.io/headless");
    }
    let service =
        object.metadata.labels.get(LABEL_SERVICE_NAME).filter(|service| !service.is_empty());
    let Some(service) = service else {
        return Converted::NotOurs("it has no label kubernetes.io/service-name");
    };
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        _ => return Converted::NotOurs("its address type is neither IPv4 nor IPv6"),
    };

    let mut complaints = Complaints::default();
    let mut converted = EndpointSlice {
        service: ObjectName::new(&name.namespace, service),
        name,
        family,
        ports: ports(object, &mut complaints),
        endpoints: object
            .endpoints
            .iter()
            .flatten()
            .enumerate()
            .filter_map(|(index, entry)| endpoint(index, entry, family, &mut complaints))
            .collect(),
        triggered: triggered(object, &mut complaints),
    };
    // Kept for as long as the object lives, and there are many.
    converted.ports.shrink_to_fit();
    converted.endpoints.shrink_to_fit();
    Converted::Ours(converted, complaints.0)
}

fn ports(object: &api::EndpointSlice, complaints: &mut Complaints) -> Vec<SlicePort> {
    let mut found = Vec::new();
    for (index, entry) in object.ports.iter().flatten().enumerate() {
        let field = |name: &str| format!("ports[{index}].{name}");
        let protocol = protocol(entry.protocol.as_deref());
        let Some(protocol) = complaints.keep(Part::Port, field("protocol"), protocol) else {
            continue;
        };
        // The API gives "no port" the meaning "all ports", which no Service port has.
        let number = entry.port.ok_or_else(|| "no port is given".to_owned()).and_then(port);
        let Some(number) = complaints.keep(Part::Port, field("port"), number) else {
            continue;
        };
        found.push(SlicePort {
            name: intern(entry.name.as_deref().unwrap_or_default()),
            protocol,
            port: number,
        });
    }
    found
}

fn endpoint(
    index: usize,
    entry: &api::Endpoint,
    family: Family,
    complaints: &mut Complaints,
) -> Option<Endpoint> {
    let address = entry
        .addresses
        .first()
        .ok_or_else(|| "the endpoint has no address".to_owned())
        .and_then(|text| endpoint_address(text, family));
    let say = |reason| {
        complaints.add(Part::Endpoint, format!("endpoints[{index}].addresses"), reason);
    };
    let address = address.map_err(say).ok()?;
    let conditions = entry.conditions.as_ref();
    Some(Endpoint {
        address,
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        placement: placement(entry).shared(),
    })
}

fn placement(entry: &api::Endpoint) -> Placement {
    let hints = entry.hints.as_ref();
    Placement {
        node: stated(entry.node_name.as_ref()).map(NodeName::new),
        zone: stated(entry.zone.as_ref()).map(Zone::new),
        hint_zones: hints
            .and_then(|hints| hints.for_zones.as_ref())
            .into_iter()
            .flatten()
            .map(|zone| Zone::new(&zone.name))
            .collect(),
        hint_nodes: hints
            .and_then(|hints| hints.for_nodes.as_ref())
            .into_iter()
            .flatten()
            .map(|node| NodeName::new(&node.name))
            .collect(),
    }
}

fn stated(name: Option<&String>) -> Option<&str> {
    name.map(String::as_str).filter(|name| !name.is_empty())
}

/// What the API's own validation refuses today may still come from older objects,
/// other writers or a manifest.
fn endpoint_address(text: &str, family: Family) -> Result<IpAddr, String> {
    let address = ip(text)?;
    if Family::of(address) != family {
        return Err(format!("{address} is not {family}, as the slice says"));
    }
    match unusable(address) {
        Some(what) => Err(format!("{address} is {what}: never an endpoint")),
        None => Ok(address),
    }
}

fn triggered(object: &api::EndpointSlice, complaints: &mut Complaints) -> Option<SystemTime> {
    let text = object.metadata.annotations.get(ANNOTATION_TRIGGERED)?;
    let time =
        text.parse::<jiff::Timestamp>().map_err(|_| format!("{text:?} is not an RFC 3339 time"));
    complaints
        .keep(Part::Setting, format!("metadata.annotations[{ANNOTATION_TRIGGERED}]"), time)
        .map(SystemTime::from)
}
