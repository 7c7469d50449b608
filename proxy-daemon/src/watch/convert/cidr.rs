//! The ServiceCIDR.

use super::{Complaints, Converted, Part, cidr};
use crate::model::{ObjectName, Rejected, ServiceCidr};
use crate::watch::wire as api;

#[must_use]
pub fn service_cidr(object: &api::ServiceCIDR) -> Converted<ServiceCidr> {
    let name = ObjectName::new("", object.metadata.name.as_deref().unwrap_or_default());
    if name.name.is_empty() {
        let reason = "metadata.name is missing".into();
        return Converted::Rejected(Rejected { kind: "ServiceCIDR", name, reason });
    }
    let mut complaints = Complaints::default();
    let texts = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
    let mut ranges = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        // What is in the range and no Service is dropped: of everything, that is all traffic.
        let range = cidr(text).and_then(|range| match range.prefix() {
            0 => Err(format!("{text:?} holds every address there is")),
            _ => Ok(range),
        });
        ranges.extend(complaints.keep(Part::Address, format!("spec.cidrs[{index}]"), range));
    }
    Converted::Ours(ServiceCidr { name, ranges }, complaints.0)
}
