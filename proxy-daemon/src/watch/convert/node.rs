//! The Node.

use super::{Complaints, Converted, Part, cidr, ip};
use crate::model::{Node, NodeName, ObjectName, Rejected, Zone};
use crate::watch::wire as api;

pub(super) const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Set by the cluster autoscaler on a node it is about to remove.
const TAINT_SCALING_DOWN: &str = "ToBeDeletedByClusterAutoscaler";

#[must_use]
pub fn node(object: &api::Node) -> Converted<Node> {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        return Converted::Rejected(Rejected {
            kind: "Node",
            name: ObjectName::new("", ""),
            reason: "metadata.name is missing".into(),
        });
    }
    let spec = object.spec.as_ref();
    let mut complaints = Complaints::default();
    let converted = Node {
        name: NodeName::new(name),
        zone: object.metadata.labels.get(LABEL_ZONE).filter(|zone| !zone.is_empty()).map(Zone::new),
        addresses: addresses(object, &mut complaints),
        pod_cidrs: spec.map(|spec| pod_cidrs(spec, &mut complaints)).unwrap_or_default(),
        deleting: object.metadata.deletion_timestamp.is_some(),
        scaling_down: spec
            .and_then(|spec| spec.taints.as_ref())
            .is_some_and(|taints| taints.iter().any(|taint| taint.key == TAINT_SCALING_DOWN)),
    };
    Converted::Ours(converted, complaints.0)
}

fn addresses(object: &api::Node, complaints: &mut Complaints) -> Vec<std::net::IpAddr> {
    let all =
        object.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let mut found = Vec::new();
    for wanted in ["InternalIP", "ExternalIP"] {
        for (index, entry) in all.iter().enumerate() {
            if entry.type_ == wanted {
                let field = format!("status.addresses[{index}].address");
                found.extend(complaints.keep(Part::Address, field, ip(&entry.address)));
            }
        }
    }
    found
}

fn pod_cidrs(spec: &api::NodeSpec, complaints: &mut Complaints) -> Vec<ipnetwork::IpNetwork> {
    let single = spec.pod_cidr.as_slice();
    spec.pod_cidrs
        .as_deref()
        .filter(|all| !all.is_empty())
        .unwrap_or(single)
        .iter()
        .enumerate()
        .filter(|(_, text)| !text.is_empty())
        .filter_map(|(index, text)| {
            complaints.keep(Part::Address, format!("spec.podCIDRs[{index}]"), cidr(text))
        })
        .collect()
}
