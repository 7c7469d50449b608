//! Annotations on a Service that say how its connections are spread.

use std::net::IpAddr;
use std::sync::Arc;

use super::{Complaints, Part, ip};
use crate::model::{NodeName, SchedulerFlags, Scheduling, Weights, Zone};
use crate::watch::wire::Metadata;

/// An IPVS scheduler for this Service instead of `--ipvs-scheduler`.
pub const ANNOTATION_SCHEDULER: &str = "ipvs.node-dataplane/scheduler";
/// Flags of that scheduler, separated by commas.
pub const ANNOTATION_FLAGS: &str = "ipvs.node-dataplane/scheduler-flags";
/// `SELECTOR=WEIGHT`, separated by commas.
pub const ANNOTATION_WEIGHTS: &str = "node-dataplane/weights";

/// Those of `net/netfilter/ipvs` (kernel 6.12).
const SCHEDULERS: [&str; 14] =
    ["rr", "wrr", "lc", "wlc", "fo", "ovf", "lblc", "lblcr", "dh", "sh", "mh", "sed", "nq", "twos"];

/// What cannot be used is complained of and left out; the rest counts.
pub fn scheduling(metadata: &Metadata, complaints: &mut Complaints) -> Option<Arc<Scheduling>> {
    let annotations = &metadata.annotations;
    let mut keep = |name: &str, checked: Result<(), String>| {
        complaints.keep(Part::Setting, format!("metadata.annotations[{name}]"), checked);
    };
    let mut scheduling = Scheduling::default();
    if let Some(text) = annotations.get(ANNOTATION_SCHEDULER) {
        keep(ANNOTATION_SCHEDULER, scheduler(text, &mut scheduling.scheduler));
    }
    for text in items(annotations.get(ANNOTATION_FLAGS)) {
        keep(ANNOTATION_FLAGS, flag(text, &mut scheduling.flags));
    }
    for text in items(annotations.get(ANNOTATION_WEIGHTS)) {
        keep(ANNOTATION_WEIGHTS, weight(text, &mut scheduling.weights));
    }
    (scheduling != Scheduling::default()).then(|| Arc::new(scheduling))
}

fn items(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.into_iter().flat_map(|text| text.split(',')).map(str::trim).filter(|item| !item.is_empty())
}

fn scheduler(text: &str, into: &mut Option<Arc<str>>) -> Result<(), String> {
    let name = text.trim();
    if !SCHEDULERS.contains(&name) {
        return Err(format!("{name:?} is no IPVS scheduler: choose of {}", SCHEDULERS.join(", ")));
    }
    *into = Some(name.into());
    Ok(())
}

fn flag(text: &str, into: &mut SchedulerFlags) -> Result<(), String> {
    match text {
        "sh-fallback" | "mh-fallback" => into.fallback = true,
        "sh-port" | "mh-port" => into.port = true,
        _ => {
            return Err(format!(
                "{text:?} is no scheduler flag: choose of sh-fallback, sh-port, mh-fallback, mh-port"
            ));
        }
    }
    Ok(())
}

/// `zone/NAME=N`, `node/NAME=N`, `ADDRESS=N` or `*=N`.
fn weight(text: &str, into: &mut Weights) -> Result<(), String> {
    let form = || {
        format!(
            "{text:?} is not SELECTOR=WEIGHT, where the selector is zone/NAME, node/NAME, an \
             address or *, and the weight 0 to 65535"
        )
    };
    let (selector, number) = text.split_once('=').ok_or_else(form)?;
    let (selector, number) = (selector.trim(), number.trim());
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(form());
    }
    let weight: u16 = number.parse().map_err(|_| form())?;
    match selector.split_once('/') {
        _ if selector == "*" => into.default = Some(weight),
        Some(("zone", name)) if !name.is_empty() => into.zones.push((Zone::new(name), weight)),
        Some(("node", name)) if !name.is_empty() => into.nodes.push((NodeName::new(name), weight)),
        Some(_) => return Err(form()),
        None => {
            let address: IpAddr = ip(selector).map_err(|_| form())?;
            into.addresses.push((address, weight));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn read(annotations: &[(&str, &str)]) -> (Option<Arc<Scheduling>>, Vec<String>) {
        let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
        let metadata = serde_json::json!({ "annotations": annotations });
        let metadata = serde_json::from_value(metadata).expect("metadata");
        let mut complaints = Complaints::default();
        let read = scheduling(&metadata, &mut complaints);
        (read, complaints.0.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn all_three_annotations_are_read() {
        let (read, complaints) = read(&[
            (ANNOTATION_SCHEDULER, "mh"),
            (ANNOTATION_FLAGS, "mh-port, mh-fallback"),
            (ANNOTATION_WEIGHTS, "zone/z1=3, node/node-b=0, 10.244.0.5=7, fd00::5=8, *=2"),
        ]);
        assert_eq!(complaints, Vec::<String>::new());
        let read = read.unwrap();
        assert_eq!(read.scheduler.as_deref(), Some("mh"));
        assert_eq!(read.flags, SchedulerFlags { fallback: true, port: true });
        assert_eq!(read.weights.default, Some(2));
        assert_eq!(read.weights.zones, [(Zone::new("z1"), 3)]);
        assert_eq!(read.weights.nodes, [(NodeName::new("node-b"), 0)]);
        let addresses: [IpAddr; 2] = ["10.244.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        assert_eq!(read.weights.addresses, [(addresses[0], 7), (addresses[1], 8)]);
    }

    #[test]
    fn a_mistake_costs_that_item_alone_and_is_named() {
        let (read, complaints) = read(&[
            (ANNOTATION_SCHEDULER, "fastest"),
            (ANNOTATION_WEIGHTS, "zone/z1=3, zone/=1, pod/x=1, 1.2.3=1, *=65536, node/a=+1, x"),
        ]);
        assert_eq!(read.unwrap().weights.zones, [(Zone::new("z1"), 3)]);
        assert_eq!(complaints.len(), 7, "{complaints:#?}");
        assert!(complaints[0].contains(ANNOTATION_SCHEDULER) && complaints[0].contains("fastest"));
    }

    #[test]
    fn other_annotations_mean_nothing() {
        assert_eq!(read(&[("example.com/weights", "*=3")]), (None, vec![]));
    }
}
